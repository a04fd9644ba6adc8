"""Anthropic's format of requests and answers, for the server: what differs from OpenAI's."""
