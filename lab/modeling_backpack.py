"""
A Backpack for transformers 4 and 5: lab.convert --to=hf puts this file beside model.py and control.py.

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model(input_ids, output_senses=True, output_contextualization=True).senses   (B,T,K,D)
model.backpack           the network: its output has last_hidden_state o (B,T,D), and the logits are E o
model.backpack.edits     None, or the edits of senses that lab.convert --edits=FILE put here

Where the model evaluates, tools that intervene find one call each of model.backpack.wte (B,T,D),
sense_network (B,T,K,D), alpha (B,K,T,S) and o (B,T,D); edits with topics call wte a second time. In
training, senses are computed once for each distinct token, and alpha is whole only where texts are padded,
packed or cached.
"""

from dataclasses import dataclass, fields
from functools import wraps

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

# transformers 4 copies only the files that are imported here, relatively and by name
from .control import EditedBackpack, Edits, padding_mask
from .model import FOR_GENERATION, Backpack, sum_senses
from .model import BackpackConfig as Sizes

# what collators send with position_ids where rows hold several texts; they say the same
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


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
        for f in fields(Sizes):
            setattr(self, f.name, values.pop(f.name, f.default))
        self.use_cache = values.pop("use_cache", True)
        # transformers 5 leaves these to each model
        defaults = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
        super().__init__(**defaults | {"pad_token_id": None} | values)


@dataclass
class BackpackOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B,T,V)
    last_hidden_state: torch.Tensor | None = None  # o (B,T,D), of model.backpack
    past_key_values: DynamicCache | None = None
    hidden_states: tuple | None = None  # what each block is given, and h: n_layer + 1 of (B,T,D)
    senses: torch.Tensor | None = None  # (B,T,K,D)
    contextualization: torch.Tensor | None = None  # alpha (B,K,T,S)


class BackpackCache(DynamicCache):
    """model.py's Cache on top of transformers', so that generate works, beams too."""

    def __init__(self):
        super().__init__()
        self.index = {}  # which layer of transformers' cache holds a name

    @property
    def past(self):
        return self.get_seq_length()

    def extend(self, name, new, dim=2):
        """Append new behind the positions held, along dim; returns all of them."""
        layer = self.index.setdefault(name, len(self.index))
        new = new.movedim(dim, 1)  # (B,T,...)
        B, T, *rest = new.shape
        # transformers' layers hold keys and values (B,heads,S,width); keys alone will do
        keys = new.reshape(B, 1, T, -1)
        keys, _ = self.update(keys, keys[..., :0], layer)  # (B,1,S,width)
        return keys.reshape(B, -1, *rest).movedim(1, dim)


# -----------------------------------------------------------------------------
# the network


class BackpackNetwork(EditedBackpack):
    """An EditedBackpack with transformers' arguments, and as many rows of E as tokens."""

    def __init__(self, config):
        edits = None
        if config.edits:  # room for their tensors, which are among the weights
            n = config.edits["rows"]
            m = config.edits["topics"]
            edits = Edits(
                row=torch.zeros(config.vocab_size, dtype=torch.long),
                scale=torch.ones(n, config.n_sense),
                offset=torch.zeros(n, config.n_sense, config.n_embd),
                w=torch.ones(m, config.vocab_size, config.n_sense),
                f=torch.ones(m),
            )
        super().__init__(Backpack(config), edits)
        # tools multiply by E themselves, and don't know that model.py gives padding no logits
        rows = self.wte.weight[: config.vocab_size].clone()
        self.wte = torch.nn.Embedding.from_pretrained(rows, freeze=False)

    @property
    def gradient_checkpointing(self):
        """model.py's grad_checkpoint, by the name under which transformers turns it on and off."""
        return self.config.grad_checkpoint

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value):
        self.config.grad_checkpoint = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        output_senses=False,
        output_contextualization=False,
        **packed,
    ):
        """BackpackOutput without logits; for the arguments see BackpackForCausalLM."""
        self.check(input_ids, inputs_embeds, position_ids, output_attentions, packed)
        e = inputs_embeds
        if e is None:
            e = self.wte(input_ids)  # (B,T,D)
        cache = self.cache_of(past_key_values, use_cache)
        mask, pos = self.mask_and_positions(attention_mask, position_ids, cache, e)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with sdpa_kernel(FOR_GENERATION):  # a cache makes the number of keys grow
            h, states = self.hidden_and_states(output_hidden_states, e, cache, mask, pos)
        C = None
        alpha = None
        asked = output_senses or output_contextualization or inputs_embeds is not None or self.has_topics
        if self.training and not asked and mask is None and cache is None and self.config.n_sense:
            ids, where = input_ids.unique(return_inverse=True)  # (U,), (B,T)
            o = self.o(sum_senses(*self.query_key(h), self.senses(ids), where))  # (B,T,D)
        else:
            C = self.senses_of(input_ids, e)  # (B,T,K,D)
            alpha, o = self.whole_sum(input_ids, h, C, cache, mask)
        return BackpackOutput(
            last_hidden_state=o,
            past_key_values=cache,
            hidden_states=states,
            senses=C if output_senses else None,
            contextualization=alpha if output_contextualization else None,
        )

    def check(self, input_ids, inputs_embeds, position_ids, output_attentions, packed):
        """TypeError or ValueError: the network can't do what these arguments of forward ask for."""
        unknown = packed.keys() - PACKED
        if unknown:
            raise TypeError(f"forward() got unexpected arguments: {', '.join(sorted(unknown))}")
        if packed and position_ids is None:
            raise ValueError("texts that are packed need position_ids")
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions: they are never whole; output_contextualization gives alpha")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and self.edits is not None:
            raise ValueError("inputs_embeds: this model has edits, which belong to token ids")

    def cache_of(self, past_key_values, use_cache):
        """The cache to go on from and to extend, or None. ValueError: it is another model's."""
        # an empty one is generate's own, with a layer per Transformer block; ours must grow
        is_held = past_key_values is not None and past_key_values.get_seq_length() > 0
        if is_held and not isinstance(past_key_values, BackpackCache):
            raise ValueError("past_key_values: expected those that this model returned")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not is_held and not use_cache:
            return None
        if self.training and self.gradient_checkpointing:
            raise ValueError("use_cache: blocks that are computed again would extend the cache again")
        return past_key_values if is_held else BackpackCache()

    def mask_and_positions(self, attention_mask, position_ids, cache, e):
        """(mask, pos) for the Transformer of embeddings e (B,T,D); None where it finds them itself."""
        T = e.size(1)
        past = 0 if cache is None else cache.past
        if attention_mask is not None:
            if attention_mask.shape != (len(e), past + T):
                found = list(attention_mask.shape)
                raise ValueError(f"attention_mask: found shape {found}, expected {[len(e), past + T]}")
            if past + T > self.config.block_size:
                raise ValueError(f"{past + T} tokens are more than block_size={self.config.block_size}")
            if self.training and attention_mask.all():  # then there is a faster way
                return None, position_ids
            mask, pos = padding_mask(attention_mask, T)
            return mask, pos if position_ids is None else position_ids
        if position_ids is None or past:
            return None, position_ids
        # without a mask, positions that don't go on begin another text in the same row
        if self.has_topics:
            raise ValueError("position_ids: edits with topics take one text a row")
        before = position_ids[:, :1] - 1  # (B,1)
        text = (position_ids.diff(prepend=before) != 1).cumsum(1)  # (B,T)
        mask = (text[:, :, None] == text[:, None]).tril()  # (B,T,T)
        return mask[:, None], position_ids

    def hidden_and_states(self, wanted, e, cache, mask, pos):
        """h (B,T,D); and, if wanted, what each block is given and h again, n_layer + 1 of (B,T,D)."""
        if not wanted:
            return self.transformer(e, cache, mask, pos), None
        given = []
        hooks = []
        for block in self.blocks:
            hooks.append(block.register_forward_pre_hook(lambda _, args: given.append(args[0])))
        try:
            h = self.transformer(e, cache, mask, pos)
        finally:
            for hook in hooks:
                hook.remove()
        return h, (*given, h)

    def senses_of(self, ids, e):
        """The senses (B,T,K,D) of ids (B,T), or without these of embeddings e (B,T,D); None if n_sense=0."""
        if not self.config.n_sense:
            return None
        if self.training and ids is not None:
            distinct, where = ids.unique(return_inverse=True)  # (U,), (B,T)
            return self.senses(distinct)[where]
        C = self.sense_network(e)  # (B,T,K,D)
        return C if self.edits is None else self.edits.senses(ids, C)


# -----------------------------------------------------------------------------
# the models


class BackpackPreTrained(PreTrainedModel):
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["BackpackNetwork"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.backpack = BackpackNetwork(config)

    def _init_weights(self, module):
        if module is getattr(self, "score", None):  # Backpack has done the rest
            torch.nn.init.normal_(module.weight, std=0.02)

    def get_decoder(self):
        return self.backpack

    def get_input_embeddings(self):
        return self.backpack.wte

    def set_input_embeddings(self, value):
        """Another E; edits leave new tokens as they are."""
        edits = self.backpack.edits
        if edits is not None:
            more = value.num_embeddings - len(edits.row)
            edits.row = F.pad(edits.row, (0, more))  # (V,)
            edits.w = F.pad(edits.w, (0, 0, 0, more), value=1.0)  # (m,V,K)
        self.backpack.wte = value


class BackpackModel(BackpackPreTrained):
    """The network alone: AutoModel."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    @wraps(BackpackNetwork.forward)
    def forward(self, *args, **arguments):
        return self.backpack(*args, **arguments)


class BackpackForCausalLM(BackpackPreTrained, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "backpack.wte.weight"}
    accepts_loss_kwargs = True  # Trainer: num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)  # E
        self.post_init()

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)  # transformers 4 gives it, but the cache knows it
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        output_senses=False,
        output_contextualization=False,
        logits_to_keep=0,
        num_items_in_batch=None,
        **packed,
    ):
        """input_ids and labels (B,T), labels -100: not counted; attention_mask (B,S), 0 at padding.

        S counts what is cached too. inputs_embeds (B,T,D): in place of ids. position_ids (B,T): from
        attention_mask, if not given; without one, rows may hold several texts, each with positions from 0.
        Labels are shifted here. logits_to_keep: of the last so many positions (0: of all), or of those in a
        tensor. num_items_in_batch: divide the sum of losses by it. Returns a BackpackOutput. ValueError: the
        model can't do what is asked.
        """
        if labels is not None and use_cache is None:
            use_cache = False  # nothing will be generated
        output = self.backpack(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            output_senses,
            output_contextualization,
            **packed | {"return_dict": True},
        )
        o = output.last_hidden_state
        if not isinstance(logits_to_keep, int):
            o = o[:, logits_to_keep]
        elif logits_to_keep:
            o = o[:, -logits_to_keep:]
        logits = self.lm_head(o)  # (B,T,V)
        loss = None
        if labels is not None:
            # it shifts the labels
            loss = self.loss_function(logits, labels, logits.size(-1), num_items_in_batch)
        return BackpackOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            senses=output.senses,
            contextualization=output.contextualization,
        )


class BackpackForSequenceClassification(BackpackPreTrained):
    """A new linear head on the sum of senses o at the last real token of each text."""

    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=False, **arguments):
        """input_ids (B,T), attention_mask (B,T), labels (B,), or (B,num_labels) of several at once.

        Padding may be left or right; without a mask there is none. For other arguments see
        BackpackForCausalLM. Returns a SequenceClassifierOutput with logits (B,num_labels).
        """
        arguments |= {"use_cache": use_cache, "return_dict": True}
        output = self.backpack(input_ids, attention_mask, **arguments)
        o = output.last_hidden_state  # (B,T,D)
        if attention_mask is None:
            attention_mask = o.new_ones(o.shape[:2])
        # the last 1 of a row is the first from its end
        from_end = attention_mask.long().flip(1).argmax(1)  # (B,)
        last = attention_mask.size(1) - 1 - from_end  # (B,)
        rows = torch.arange(len(o), device=o.device)  # (B,)
        logits = self.score(o[rows, last])  # (B,num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
