# SPDX-License-Identifier: Apache-2.0
"""The transformers quantizer plug-in: ``from_pretrained(OUT)`` of the original's class loads a fewbit folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.containers import terms as T
from fewbit.core.rewrite import STEPS
from fewbit.errors import CorruptFileError, FewbitError, InputError, UnsupportedError
from fewbit.model.layers import ExpertBank, QuantEmbedding, QuantLinear, Store

METHOD = "fewbit"
KINDS = ("linear", "conv1d", "head", "experts", "embedding", "vision")


class FewbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a fewbit folder.

    ``modules``: module path -> ``{"kind", "format", "layout", "shape": [rows, columns]}`` and, where they apply,
    ``"experts"``, ``"activation"``, ``"rewrites"``, ``"tied_to"``. In place of format and layout, a linear layer may
    have ``"terms"``: the description of a sum (:mod:`fewbit.containers.terms`).
    """

    def __init__(self, modules: dict[str, dict[str, Any]] | None = None, version: int = 1, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.version = version
        self.modules = modules or {}
        for name, entry in self.modules.items():
            if not isinstance(entry, dict) or entry.get("kind") not in KINDS or len(entry.get("shape", ())) != 2:
                raise CorruptFileError(f"quantization_config of {name}", f"found {entry!r}", "quantize again")
            rewrites = entry.get("rewrites", [])
            if not isinstance(rewrites, list) or not all(isinstance(k, str) and k in STEPS for k in rewrites):
                works = f"this fewbit rewrites inputs by {', '.join(STEPS)}; quantize again, or use a newer one"
                raise CorruptFileError(f"rewrites of {name}", f"found {rewrites!r}", works)


class FewbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized modules into the empty model before transformers loads the arrays into them."""

    requires_calibration = True
    quantization_config: FewbitConfig

    def __init__(self, quantization_config: FewbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not {str(device) for device in devices} <= {"None", "cpu", "auto"}:
            raise UnsupportedError(
                f"device_map {device_map!r}", "fewbit's kernels run on the CPU", "leave device_map out"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype or torch.float32
        return self._dtype

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map == "auto" else device_map

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Arrays keep the dtype they are stored in: a scale cast to bfloat16 would be another model."""
        return None

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Files hold parameters as the model has them: none is stacked of several, or turned around."""
        return [entry for entry in weight_conversions if isinstance(entry, WeightRenaming)]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, entry in self.quantization_config.modules.items():
            try:
                _replace(model, name, entry, self._dtype)
            except AttributeError:
                raise _misses(model, name) from None
        # A tied head runs on the embedding's arrays (see _tie); transformers must not look for `.weight` on either.
        if any("tied_to" in entry for entry in self.quantization_config.modules.values()):
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
        if any(entry["kind"] == "experts" for entry in self.quantization_config.modules.values()):
            model.config._experts_implementation = "eager"

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        tied = {name for name, entry in self.quantization_config.modules.items() if "tied_to" in entry}
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, ExpertBank)):
                if name not in tied:
                    module.prepare()
            elif not isinstance(module, Store):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._dtype)
        for name in tied:
            _tie(model, name, self.quantization_config.modules[name]["tied_to"])
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        found = "layers hold codes, inputs of some are rewritten or rounded, and no float model is made of them"
        works = "the model that was quantized (`source` in fewbit.json); layer.weight_of().dequantize() gives a matrix"
        raise UnsupportedError(f"dequantize() of a {type(model).__name__}", found, works)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters beside them: layers pass gradients to their inputs, and their codes stay."""
        return True


def _misses(model: Any, name: str) -> FewbitError:
    """What to tell where ``model`` has no module ``name``: most often it is of another class than was quantized."""
    built, quantized = type(model).__name__, getattr(model.config, "architectures", None) or []
    if quantized and built not in quantized:
        found = f"what was quantized is a {quantized[0]}, of whose modules it lacks {name}"
        return InputError(
            f"a quantized folder as a {built}", found, "the Auto class of that one, or fewbit.load, works"
        )
    works = "leave out what changes its configuration, or quantize again"
    return CorruptFileError(f"module {name}", "the model has no such module", works)


def _replace(model: nn.Module, name: str, entry: dict[str, Any], dtype: torch.dtype) -> None:
    """Swap the module (or fused parameter) called ``name`` for its quantized form, on the meta device."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    with torch.device("cpu"):
        if entry["kind"] == "experts":
            bank = ExpertBank(entry["format"], entry["layout"], shape, int(entry["experts"]))
            delattr(parent, leaf)
            parent.add_module(leaf, bank.to("meta"))
            return
        old = parent.get_submodule(leaf)
        if entry["kind"] == "embedding":
            # Gemma multiplies embeddings; its buffer is still on the meta device, the plain number beside it is not.
            scale = getattr(old, "scalar_embed_scale", None)
            new: QuantEmbedding | QuantLinear = QuantEmbedding(entry["format"], entry["layout"], shape, scale, dtype)
        else:
            bias = getattr(old, "bias", None)
            rewrites = entry.get("rewrites", ())
            new = QuantLinear(T.of_entry(entry), bias, entry.get("activation"), rewrites, dtype=dtype)
        new.name = name
    for key, buffer in list(new.named_buffers(recurse=False)):
        if key.startswith(("weight_", "input_")):
            new.register_buffer(key, buffer.to("meta"), persistent="tied_to" not in entry)
    setattr(parent, leaf, new)
    # Some families initialise a child's `weight` from its parent (GPT-2's c_proj); there is none to initialise.
    parent.__dict__["_is_hf_initialized"] = True


def _tie(model: nn.Module, name: str, source: str) -> None:
    """The head ``name`` runs on the embedding's arrays; nothing is stored twice."""
    head, embedding = model.get_submodule(name), model.get_submodule(source)
    assert isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding)
    for array in embedding.arrays:
        head.register_buffer(f"weight_{array}", getattr(embedding, f"weight_{array}"), persistent=False)
    head.prepare()
    embedding.share(head)


def register() -> None:
    """Add our rows to transformers' tables; harmless when done before."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FewbitConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, FewbitQuantizer)
