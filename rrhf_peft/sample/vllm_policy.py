"""Candidates from vLLM: top_p and beam, with or without a LoRA adapter.

Written against vLLM's documented offline interface; the test suite does not run it, because vLLM needs a
GPU and an installation of its own. vLLM schedules its own batches, so the token budget has no say, and a
resumed run repeats its draws only as far as vLLM's per-request seeds do.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rrhf_peft.records import UserError
from rrhf_peft.sample.policies import Candidate, Decoding, FinishReason
from rrhf_peft.sample.transformers_policy import StopStrings, response_text


class VllmPolicy:
    """A model inside vLLM, on this process's GPU.

    Args:
        model: Hub id or folder.
        revision: Hub branch, tag or commit.
        dtype: auto, float32, bfloat16 or float16.
        tokenizer: If not the model's own.
        trust_remote_code: Run code that comes with the weights.
        adapter: Local folder of a LoRA adapter in PEFT format.

    Raises:
        UserError: vLLM is not installed, or the adapter is not a local folder.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        adapter: str | None = None,
    ) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise UserError(
                "backend vllm needs vLLM, which is not installed. Install it: pip install 'rrhf-peft[vllm]', or set "
                "backend: transformers."
            ) from None
        self._vllm: Any = vllm
        lora: dict[str, Any] = {}
        self._lora: Any = None
        if adapter is not None:
            config = Path(adapter) / "adapter_config.json"
            if not config.is_file():
                raise UserError(f"{adapter}: with backend vllm an adapter must be a local folder. Download it first.")
            lora = {"enable_lora": True, "max_lora_rank": int(json.loads(config.read_text(encoding="utf-8"))["r"])}
            self._lora = LoRARequest(Path(adapter).name, 1, str(adapter))
        self._model = vllm.LLM(
            model=model,
            tokenizer=tokenizer,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **lora,
        )
        self._tokenizer = self._model.get_tokenizer()

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        decoding: Decoding,
        progress: Callable[[int, int], None] | None = None,
        *,
        ends: Sequence[int] = (),
        too_long: Callable[[int, str], None] | None = None,
    ) -> list[list[Candidate]]:
        """The k candidates of each prompt (token ids), in order; see `transformers_policy.respond`."""
        inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        candidates = (
            self._beams(inputs, decoding) if decoding.strategy == "beam" else self._draws(inputs, keys, decoding, ends)
        )
        if progress is not None:
            progress(len(prompts), sum(item.num_tokens or 0 for group in candidates for item in group))
        return candidates

    def _draws(
        self, inputs: Sequence[Any], keys: Sequence[str], decoding: Decoding, ends: Sequence[int]
    ) -> list[list[Candidate]]:
        k = decoding.k
        settings = [
            self._vllm.SamplingParams(
                n=1,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                stop=list(decoding.stop) or None,
                stop_token_ids=list(ends) or None,
                seed=zlib.crc32(f"{key}/{number}".encode()) & 0x7FFFFFFF,
            )
            for key in keys
            for number in range(k)
        ]
        repeated = [item for item in inputs for _ in range(k)]
        outputs = self._model.generate(repeated, settings, lora_request=self._lora, use_tqdm=False)
        flat = [self._drawn(output.outputs[0]) for output in outputs]
        return [flat[start : start + k] for start in range(0, len(flat), k)]

    def _drawn(self, output: Any) -> Candidate:
        reason: FinishReason = "length" if output.finish_reason == "length" else "eos"
        if isinstance(output.stop_reason, str):
            reason = "stop"
        ids = list(output.token_ids)
        return Candidate(output.text, len(ids), None, reason, None if reason == "stop" else ids)

    def _beams(self, inputs: Sequence[Any], decoding: Decoding) -> list[list[Candidate]]:
        """vLLM's beam search knows no stop strings: they are cut off afterwards."""
        from vllm.sampling_params import BeamSearchParams

        settings = BeamSearchParams(
            beam_width=decoding.num_beams,
            max_tokens=decoding.max_new_tokens,
            length_penalty=decoding.length_penalty,
        )
        outputs = self._model.beam_search(inputs, settings, lora_request=self._lora)
        stop = StopStrings(self._tokenizer, decoding.stop)
        candidates = []
        for item, output in zip(inputs, outputs, strict=True):
            prompt = item["prompt_token_ids"]
            beams = []
            for beam in output.sequences[: decoding.k]:
                ids = list(beam.tokens[len(prompt) :])
                text, stopped = stop.cut(response_text(self._tokenizer, prompt, ids))
                ended = bool(ids) and ids[-1] == self._tokenizer.eos_token_id
                reason: FinishReason = "stop" if stopped else "eos" if ended else "length"
                beams.append(Candidate(text, len(ids), float(beam.cum_logprob), reason))
            candidates.append(beams)
        return candidates
