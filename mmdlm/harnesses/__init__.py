"""Let lm-eval and lmms-eval ask a model, by settings under which scores were published."""
