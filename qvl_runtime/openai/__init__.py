"""OpenAI's format of requests and answers, for the server and for jobs."""
