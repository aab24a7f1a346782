"""Wires a bundle to what turns a prompt into text: a decoder, a prompt encoder, schedulers and detokenizers."""

from collections.abc import Callable, Sequence

from torch import Tensor

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.replica.prompt_encoder import PromptEncoder
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.streaming.tool_call_formats import form_of
from tidar_core.artifacts.model.bundle import DTYPES, Bundle, load_drafts, load_for_decoding
from tidar_core.artifacts.model.bundle_info import BundleInfo, base_location, read_bundle_info
from tidar_core.artifacts.model.latency_file import bundle_planner
from tidar_core.artifacts.text.chat_template import ChatTemplate, load_chat_template
from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import MAX_WAITING, Scheduler
from tidar_core.errors import BundleError
from tidar_core.planning.step_timing import BUDGET_SECONDS

__all__ = ["BundleRuntime"]


class BundleRuntime:
    """A bundle on a device, ready to decode."""

    def __init__(
        self,
        bundle: Bundle,
        uri: str,
        draft: DraftConfig,
        *,
        slots: int,
        context_len: int | None = None,
        pages: int | None = None,
        template: ChatTemplate | None = None,
        tool_form: str | None = None,
    ) -> None:
        """uri          location of the bundle, beside which a latency table may lie
        slots        sequences that may run together
        context_len  most tokens of prompt and completion; the model's own by default
        pages        pages of the cache; by default enough for `slots` whole contexts
        template     `None` for a model without a chat template
        tool_form    key of the format in which the model writes tool calls; None if it has none
        """
        self.uri, self.tokenizer, self.template, self.tool_form = uri, bundle.tokenizer, template, tool_form
        self.decoder = Decoder(bundle.model, draft, slots=slots, context_len=context_len, pages=pages)
        self.prompts = PromptEncoder(
            bundle.tokenizer,
            template,
            end_ids=bundle.end_ids,
            vocab_size=bundle.model.config.vocab_size,
            context_len=self.decoder.context_len,
            tool_form=tool_form,
        )

    @staticmethod
    def load(served: ModelVersion) -> "BundleRuntime":
        """Load the weights of a model version with its settings.

        Raises BundleError where the bundle is damaged, or is no longer the one that was resolved.
        """
        settings, uri = served.settings, served.bundle_uri
        bundle = load_for_decoding(uri, DTYPES[settings.dtype], settings.device, weights=settings.weights)
        _require_resolved(served, bundle.info)
        template = load_chat_template(base_location(uri, bundle.info), instead=settings.chat_template)
        return BundleRuntime(
            bundle,
            uri,
            DraftConfig(block_len=served.block_len, kind=settings.draft_kind),
            slots=settings.rows,
            context_len=settings.context_len,
            pages=settings.pages,
            template=template,
            tool_form=None if template is None else form_of(template, settings.tool_form),
        )

    def read_drafts(self, served: ModelVersion) -> dict[str, Tensor]:
        """Weights of the drafts of a version with the same base, for `Decoder.load_drafts`.

        Raises BundleError where the bundle is damaged, or is no longer the one that was resolved.
        """
        info = read_bundle_info(served.bundle_uri)
        _require_resolved(served, info)
        return load_drafts(served.bundle_uri, info, DTYPES[served.settings.dtype])

    def scheduler(
        self,
        mode: str,
        *,
        planned_len: int | None = None,
        max_waiting: int = MAX_WAITING,
        budget: float = BUDGET_SECONDS,
        report: Callable[[str], None] = lambda line: None,
    ) -> Scheduler:
        """A scheduler on the decoder, which has one at a time. Times decode steps where `auto` has no latency table.

        planned_len  longest context that is planned for; the decoder's own by default
        budget       seconds for timing
        report       called with a line when timing begins and ends
        """
        planner = bundle_planner(mode, self.uri, self.decoder, planned_len, budget=budget, report=report)
        return Scheduler(self.decoder, planner, max_waiting=max_waiting)

    def detokenizer(self, request: GenerationRequest, prompt: Sequence[int]) -> IncrementalDetokenizer:
        """A detokenizer for the completion of `request`.

        prompt  the tokens of its prompt
        """
        return IncrementalDetokenizer(self.tokenizer, request, prompt, block_len=self.decoder.draft.block_len)


def _require_resolved(served: ModelVersion, info: BundleInfo) -> None:
    """Raise BundleError if this is not the bundle that was resolved."""
    if info.bundle_hash != served.bundle_hash:
        raise BundleError(
            f"{served.bundle_uri} has hash {info.bundle_hash}; the service was started with {served.bundle_hash}; "
            "restart it to serve the new bundle"
        )
