"""The engine behind an OpenAI endpoint. Nothing of the server is imported before it is used."""
