"""A Backpack for transformers 4 and 5: convert.py --to=hf puts this file beside model.py, which it wraps.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model(input_ids, output_senses=True, output_contextualization=True).senses       (B,T,K,D)
    model.backpack.edits                       None, or the changes of senses that convert.py --edits=FILE put here
"""
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .checkpoints import CheckpointError  # noqa: F401  transformers 4 copies only the files that are named here
from .model import Backpack, Edits
from .model import BackpackConfig as Sizes
from .weighted_sum import weighted_sum  # noqa: F401


class BackpackConfig(PretrainedConfig):
    """The fields of BackpackConfig of model.py; edits: None, or the sizes of an Edits {"rows": n, "topics": m}."""
    model_type = "nanobackpack"
    keys_to_ignore_at_inference = ["past_key_values"]  # Trainer adds to this list
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "max_position_embeddings": "block_size"}

    def __init__(self, edits=None, **values):
        self.edits = edits
        for f in fields(Sizes):
            setattr(self, f.name, values.pop(f.name, f.default))
        super().__init__(**{"tie_word_embeddings": False, "use_cache": True} | values)


@dataclass
class BackpackOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None                # (B,T,V)
    past_key_values: DynamicCache | None = None
    senses: torch.Tensor | None = None                # (B,T,K,D), on request
    contextualization: torch.Tensor | None = None     # (B,K,T,T), on request


class CacheOfTransformers:
    """model.py's Cache upon that of transformers, so that generate, beams too, works on it: a layer for each name."""

    def __init__(self, past):
        self.tensors, self.layers, self.past = past, {}, past.get_seq_length()

    def extend(self, name, new):
        """Append new (B,N,T,width) behind what is held; returns all of it (B,N,S,width)."""
        layer = self.layers.setdefault(name, len(self.layers))
        return self.tensors.update(new, new[..., :0], layer)[0]


class BackpackForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["Block", "SenseNetwork"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.backpack = Backpack(Sizes(**{f.name: getattr(config, f.name) for f in fields(Sizes)}))
        if config.edits:  # their tensors are among the weights
            n, m, V, K = config.edits["rows"], config.edits["topics"], config.vocab_size, config.n_sense
            self.backpack.edits = Edits(
                row=torch.zeros(V, dtype=torch.long), scale=torch.ones(n, K), offset=torch.zeros(n, K, config.n_embd),
                w=torch.ones(m, V, K), f=torch.ones(m))
        self.post_init()

    def _init_weights(self, module):
        pass  # Backpack has done it

    def get_input_embeddings(self):
        return self.backpack.wte

    def get_output_embeddings(self):
        return None  # E, cut to the vocabulary

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                output_senses=False, output_contextualization=False, return_dict=None, num_items_in_batch=None,
                **unused):
        """input_ids, labels (B,T), -100 where none counts; attention_mask (B,S) with what is cached, 0 at padding."""
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        use_cache = (not self.training if use_cache is None else use_cache) and labels is None
        if use_cache and (past_key_values is None or not past_key_values.get_seq_length()):
            past_key_values = DynamicCache()  # one that grows: generate's has as many layers as the Transformer
        cache = CacheOfTransformers(past_key_values) if use_cache else None
        o, _ = self.backpack._output(input_ids, attention_mask, cache)                             # (B,T,D)
        logits, loss = self.backpack._logits(o), None                                              # (B,T,V)
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]                                     # (B,T)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten().to(logits.device),
                                   reduction="mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        found = BackpackOutput(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None,
            senses=self.backpack.senses(input_ids) if output_senses else None,
            contextualization=self.backpack.contextualization(input_ids, attention_mask)
            if output_contextualization else None)
        return found.to_tuple() if return_dict is False else found
