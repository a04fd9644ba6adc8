"""Published tasks: files, prompts, metrics and scores, and the comparison of models.

A task is data (`tasks`): a reader of its files (`readers`), prompts of each family (`prompts`), a metric (`metrics`),
and published scores. `runner` answers the questions and stores every answer; `comparison` computes the table.
"""
