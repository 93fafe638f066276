"""
A Backpack for transformers 4 and 5: lab.convert --to=hf puts this file beside model.py and control.py.

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model(input_ids, output_senses=True, output_contextualization=True).senses   (B,T,K,D)
model.backpack.edits     None, or the edits of senses that lab.convert --edits=FILE put here
"""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

# transformers 4 copies only the files that are imported here, relatively and by name
from .control import EditedBackpack, Edits, padding_mask
from .model import Backpack
from .model import BackpackConfig as Sizes

FIELDS = fields(Sizes)


class BackpackConfig(PretrainedConfig):
    """The fields of model.py's BackpackConfig; edits: None, or their sizes {"rows": n, "topics": m}."""

    model_type = "nanobackpack"
    keys_to_ignore_at_inference = ["past_key_values"]  # Trainer adds to this list
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, edits=None, **values):
        self.edits = edits
        for f in FIELDS:
            setattr(self, f.name, values.pop(f.name, f.default))
        super().__init__(**{"tie_word_embeddings": True, "use_cache": True} | values)


@dataclass
class BackpackOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B,T,V)
    past_key_values: DynamicCache | None = None
    senses: torch.Tensor | None = None  # (B,T,K,D), on request
    contextualization: torch.Tensor | None = None  # (B,K,T,T), on request


class TransformersCache:
    """model.py's Cache on top of transformers', so that generate works, beams too."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.layers = {}  # which layer of transformers' cache holds a name
        self.past = tensors.get_seq_length()

    def extend(self, name, new, dim=2):
        """Append new behind the positions held, along dim; returns all of them."""
        layer = self.layers.setdefault(name, len(self.layers))
        new = new.movedim(dim, 1)  # (B,T,...)
        B, T, *rest = new.shape
        # transformers' layers hold keys and values (B,heads,S,width); keys alone will do
        keys = new.reshape(B, 1, T, -1)
        keys, _ = self.tensors.update(keys, keys[..., :0], layer)  # (B,1,S,width)
        return keys.reshape(B, -1, *rest).movedim(1, dim)


class BackpackPreTrained(PreTrainedModel):
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["Block", "SenseNetwork"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        sizes = Sizes(**{f.name: getattr(config, f.name) for f in FIELDS})
        edits = None
        if config.edits:  # room for their tensors, which are among the weights
            n = config.edits["rows"]
            m = config.edits["topics"]
            edits = Edits(
                row=torch.zeros(sizes.vocab_size, dtype=torch.long),
                scale=torch.ones(n, sizes.n_sense),
                offset=torch.zeros(n, sizes.n_sense, sizes.n_embd),
                w=torch.ones(m, sizes.vocab_size, sizes.n_sense),
                f=torch.ones(m),
            )
        self.backpack = EditedBackpack(Backpack(sizes), edits)

    def _init_weights(self, module):
        if module is getattr(self, "score", None):  # Backpack has done the rest
            torch.nn.init.normal_(module.weight, std=0.02)

    def get_input_embeddings(self):
        return self.backpack.wte

    def set_input_embeddings(self, value):
        """Another E: it has as many tokens as rows; edits leave the new ones as they are."""
        edits = self.backpack.edits
        if edits is not None:
            more = value.num_embeddings - len(edits.row)
            edits.row = F.pad(edits.row, (0, more))  # (V,)
            edits.w = F.pad(edits.w, (0, 0, 0, more), value=1.0)  # (m,V,K)
        self.backpack.wte = value
        self.backpack.config.vocab_size = value.num_embeddings

    set_output_embeddings = set_input_embeddings  # tied

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, **how):
        """As transformers has it, but always to a multiple of 8, as the rows of model.py's E are."""
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of or 8, **how)

    def get_output_embeddings(self):
        return self.backpack.wte  # tied: E, and up to seven rows of padding, which have no logits


def padding_of(input_ids, attention_mask):
    """(mask, pos) for EditedBackpack.output; None and None where nothing is padded."""
    if attention_mask is None or attention_mask.all():
        return None, None
    return padding_mask(attention_mask, input_ids.size(1))


class BackpackForCausalLM(BackpackPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_senses=False,
        output_contextualization=False,
        return_dict=None,
        num_items_in_batch=None,
        **unused,
    ):
        """input_ids and labels (B,T), labels -100: not counted; attention_mask (B,S), 0 at padding.

        S counts what is cached too. Labels are shifted here. Returns a BackpackOutput.
        """
        model = self.backpack
        mask, pos = padding_of(input_ids, attention_mask)
        cache = None
        if use_cache is None:
            use_cache = not self.training
        if not use_cache or labels is not None:
            past_key_values = None
        else:
            # generate's own cache has a layer per Transformer block; ours must grow
            if past_key_values is None or not past_key_values.get_seq_length():
                past_key_values = DynamicCache()
            cache = TransformersCache(past_key_values)
        if mask is None and cache is None:
            logits, _ = model(input_ids)  # (B,T,V), without (B,K,T,T) weights in memory
        else:
            logits = model.logits(model.output(input_ids, cache, mask, pos))  # (B,T,V)
        loss = None
        if labels is not None:
            # it shifts the labels
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.size(-1),
                num_items_in_batch=num_items_in_batch,
            )
        senses = None
        if output_senses:
            senses = model.senses(input_ids)
        contextualization = None
        if output_contextualization:
            contextualization = model.contextualization(input_ids, mask, pos)
        output = BackpackOutput(loss, logits, past_key_values, senses, contextualization)
        return output.to_tuple() if return_dict is False else output


class BackpackForSequenceClassification(BackpackPreTrained):
    """A new linear head on the sum of senses o at the last real token of each text."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **unused):
        """input_ids (B,T), attention_mask (B,T), labels (B,), or (B,num_labels) of several at once.

        Padding may be left or right; without a mask there is none. Returns a SequenceClassifierOutput with
        logits (B,num_labels).
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask, pos = padding_of(input_ids, attention_mask)
        o = self.backpack.output(input_ids, None, mask, pos)  # (B,T,D)
        # the last 1 of a row is the first from its end
        from_end = attention_mask.long().flip(1).argmax(1)  # (B,)
        last = attention_mask.size(1) - 1 - from_end  # (B,)
        rows = torch.arange(len(o), device=o.device)  # (B,)
        logits = self.score(o[rows, last])  # (B,num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
