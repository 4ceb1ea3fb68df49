"""rrhf-peft: align a language model with ranked responses, on the GPU you own."""

import logging

__version__ = "0.1.0"

# bitsandbytes says on import that an optional CPU kernel is missing, which this package keeps switched
# off (`modeling.quantization`). The filter has to stand before anything imports bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
)
