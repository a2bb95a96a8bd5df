"""ain_jax: language-inclusive multimodal models, from a tokenizer to a Hugging Face folder, in JAX."""

__version__ = "0.1.0"
