"""Hold the limits of a server and how it is reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """What a server takes, and how much of it.

    Attributes:
        model_name: Under which the model is served.
        api_keys: One of which a request needs; empty: none is needed.
        cors_origins: Web origins whose pages may call the server; empty: none.
        max_batch_size: Rows (texts and images) that are denoised at a time.
        max_queue: Requests that wait beyond those; more are refused with status 429.
        max_choices: The largest `n` of a request.
        max_body_bytes: The largest body of a request.
        max_pixels: The largest image that is read.
        max_new_tokens: The largest text that a request may ask for, in tokens.
        max_steps: Most denoising steps that a request may ask for.
        timeout: Seconds after which a request is given up.
        drain: Seconds that a stopping server gives the requests that it has.
        log_prompts: Whether logs hold what was asked and answered.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_batch_size: int = 16
    max_queue: int = 64
    max_choices: int = 8
    max_body_bytes: int = 32 << 20
    max_pixels: int = 50_000_000
    max_new_tokens: int = 4096
    max_steps: int = 1024
    timeout: float = 300.0
    drain: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("max_batch_size", "max_choices", "max_body_bytes", "max_pixels", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queue < 0:
            raise ValueError(f"max_queue must not be negative, got {self.max_queue}")
        if self.timeout <= 0 or self.drain < 0:
            raise ValueError(
                f"timeout must be above 0 and drain at least 0 seconds, got {self.timeout} and "
                f"{self.drain}"
            )
        if any(not key.strip() for key in self.api_keys):
            raise ValueError("an API key is empty; leave it out")
