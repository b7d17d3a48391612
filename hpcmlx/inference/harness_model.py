"""The model that lm-eval sees: an adapter of `lm_eval.api.model` on world rank 0.

The only module that imports lm-eval at its top; harness.py imports it where lm-eval is wanted. As
in lm-eval's own models, what is longer than the context loses its beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hpcmlx.errors import InputError
from hpcmlx.inference.request import check_sampling
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.inference.scoring import ScoreRow
from hpcmlx.models.tokenizer import ChatRenderer, encode

if TYPE_CHECKING:
    from hpcmlx.inference.harness import Crew

_log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_GEN_TOKS = 256  # of a task that does not say, as in lm-eval's own models


class HarnessModel(TemplateLM):
    """lm-eval's requests as rows to score and requests to generate.

    Args:
        crew: the ranks that do the work.
        tokenizer: mlx-lm's TokenizerWrapper.
        max_length: tokens that the model can see at once.
        name: of the model, for lm-eval's results.
    """

    def __init__(self, crew: Crew, tokenizer: Any, max_length: int, name: str):
        super().__init__()
        self.crew, self.tokenizer, self.max_length = crew, tokenizer, max_length
        self._name = name
        self._render = ChatRenderer(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return self._render.text(chat_history, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(before, after) for _, before, after in requests]
        self._tell_truncated(
            sum(
                len(b) + len(a) > len(r.tokens) for (_, b, a), r in zip(requests, rows, strict=True)
            )
        )
        return [(score.total, score.is_greedy) for score in self.crew.score(rows)]

    def _row(self, before: Sequence[int], after: Sequence[int]) -> ScoreRow:
        # The last token is predicted but never seen, so one more fits.
        tokens = [*before, *after][-(self.max_length + 1) :]
        if not 0 < len(after) < len(tokens):
            raise InputError(
                f"lm-eval asks for the likelihood of a text of {len(after)} tokens; it takes one "
                f"at least, and at most the model's context of {self.max_length}"
            )
        return ScoreRow(tokens, len(tokens) - len(after))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows: list[ScoreRow] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for before, after in map(make_disjoint_window, windows):
                rows.append(ScoreRow([*before, *after], len(before)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self.crew.score(rows), strict=True):
            totals[number] += score.total
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        wanted, num_truncated = [], 0
        for number, request in enumerate(requests):
            context, options = request.args
            sampling = self._sampling(options, number)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise InputError(
                    f"max_gen_toks={sampling.max_tokens} of the task leaves no room for a prompt "
                    f"in the model's context of {self.max_length}"
                )
            tokens = self.tok_encode(context)
            num_truncated += len(tokens) > room
            wanted.append(Request(number, str(number), tuple(tokens[-room:]), sampling))
        self._tell_truncated(num_truncated)
        return [row.text for row in self.crew.generate(wanted)]

    def _sampling(self, options: dict[str, Any], number: int) -> SamplingParams:
        options = normalize_gen_kwargs(options, _MAX_GEN_TOKS)
        stop = tuple(text for text in options.pop("until") if text)
        max_tokens = options.pop("max_gen_toks")
        if not options.pop("do_sample"):  # greedy, whatever else it says
            return SamplingParams(max_tokens=max_tokens, stop=stop)
        known = {key: options.pop(key) for key in _SAMPLING if key in options}
        if options:
            raise InputError(f"the task's generation_kwargs {sorted(options)} are not supported")
        params = SamplingParams(**known, max_tokens=max_tokens, stop=stop, seed=row_seed(0, number))
        if problem := check_sampling(params):
            raise InputError(f"the task's generation_kwargs: {problem}")
        return params

    def _tell_truncated(self, number: int) -> None:
        if number:
            _log.warning(
                "%d prompts are longer than the model's context of %d tokens and lose their "
                "beginning",
                number,
                self.max_length,
            )
