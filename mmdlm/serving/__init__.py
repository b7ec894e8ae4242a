"""Serve a model: batching by denoising steps, and OpenAI's API over HTTP."""
