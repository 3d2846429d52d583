"""ChatGLMPreTrainedModel: what both model classes tell transformers about themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.positions import find_layout, positions, prefix_blocked
from ..quantization import QuantizedEmbedding
from .configuration import ChatGLMConfig
from .loading import DTYPE_KEY, fill_new_prefix, report_new_prefix, verify_before_loading


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and the parts that transformers asks a model class for."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    is_parallelizable = False
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    # Stored by the original for every layer, and ignored by it when it loads.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"prefix_encoder\."]  # noqa: RUF012 - `report_new_prefix` speaks of it
    # As in the original, norms stay fp32 until `.half()` casts everything; a prefix too.
    _keep_in_fp32_modules = ["input_layernorm", "post_attention_layernorm", "final_layernorm"]  # noqa: RUF012
    has_new_prefix = False
    own_tensors: tuple[str, ...] = ()
    """Beginnings of tensor names that a class has beside the language model's."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a local folder is verified before memory is spent, and without a dtype the
        checkpoint's own is used in every version.
        """
        verify_before_loading(pretrained_model_name_or_path, kwargs, cls.own_tensors)
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs[DTYPE_KEY] = "auto"
        kwargs.setdefault("low_cpu_mem_usage", True)  # one copy of the weights, also before transformers 4.5x
        result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        fill_new_prefix(model)
        model.freeze_base()
        report_new_prefix(model)
        return result

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of hidden states on an accelerator."""
        table = self.get_input_embeddings()
        dtype: torch.dtype = table.dtype_like.dtype if isinstance(table, QuantizedEmbedding) else table.weight.dtype
        return dtype

    def _init_weights(self, module: nn.Module) -> None:
        """For what no checkpoint filled. A prefix keeps torch's defaults, as in the original."""
        # `nn.init` functions, because transformers 5 makes those leave loaded weights alone.
        if getattr(module, "is_of_prefix", False):
            self.has_new_prefix |= not getattr(module.weight, "_is_hf_initialized", False)
            module.reset_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_masks(self, input_ids: Tensor, device: Any = None) -> Tensor:
        """The mask that `forward` derives from ids, bool [batch, 1, tokens, tokens], True = blocked."""
        layout = find_layout(input_ids, self.config.description)
        return prefix_blocked(layout, input_ids.shape[1]).to(device or input_ids.device)

    def get_position_ids(
        self, input_ids: Tensor, mask_positions: Any = None, device: Any = None, use_gmasks: Any = None
    ) -> Tensor:
        """The positions that `forward` derives from ids, int64 [batch, 2, tokens], or [batch, tokens] in 1-D.

        `mask_positions` and `use_gmasks` are the original's arguments; both are found in the ids.
        """
        description = self.config.description
        layout = find_layout(input_ids, description)
        return positions(layout, input_ids.shape[1], description).to(device or input_ids.device)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: this class is found by name, and its source is not copied beside saved models."""

    def freeze_base(self) -> None:
        """With P-tuning only the prefix is trained; without, nothing changes."""
        if self.config.pre_seq_len is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("prefix_encoder." in name)
