"""The published tasks: their files, prompts, metrics and scores, and models compared on them.

A task is data (`tasks`): what reads its files (`readers`), how a family is asked (`prompts`), what scores the answers
(`metrics`), and what was published. `runner` asks the models and keeps every answer; `comparison` makes the table.
"""
