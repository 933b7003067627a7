"""The model over HTTP: OpenAI's and Anthropic's interfaces, metrics, and a page with an X-ray."""
