"""rrhf-peft: align a language model with ranked responses, on the GPU you own."""

__version__ = "0.1.0"
