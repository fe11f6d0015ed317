"""The policy under a prefix: latent z -> prefix embeddings, prefix -> rollout, rollout -> log-probs (Sec. 3.3).

Three parts, in reading order:
  1. the palette: where prefixes come from (the prior, one domain, a fixed z, and the controls without a VAE);
  2. the batched decoder: generation with a KV cache where every row has its own prefix, or none;
  3. log-probs of completions under their prefixes, for training: the same numbers the decoder sampled from.

The layout of a row is everywhere [pads | prefix | prompt | completion | pads]: the prefix stands right before the prompt,
never before the pads, and position 0 is the row's first real slot.

Departs from the paper: the VLM's GPT-style prefix decoder is not here yet; "tiled" (one z repeated L times) is the default,
because independent draws average out at large L (measured on the tiny world; `--independent` is the alternative in Eq. 9).

Run it (greedy answers of one question under several latents):
    python prefix.py                                                       # the tiny world; makes what is missing
    python prefix.py --model Qwen/Qwen3-0.6B --vae runs/qwen/vae --prompt "What is 17 * 23?"
"""
import argparse
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from vae import VAE, find_model

# ------------------------------------------------------------------------------------------------------------------------
# 1. The palette: where prefixes come from

SOURCES = ("none", "prior", "mixture", "noise", "gauss")        # and every domain of the VAE by its name


def load_policy(name, device="cpu", dtype=torch.float32):
    """A causal language model and its tokenizer, ready for rollouts (eval mode, no dropout).

    name: hub name, folder or "tiny". Raises ValueError in one sentence if there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name = find_model(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model '{name}': {str(error).splitlines()[0]} (give a hub name, a folder "
                         "written by save_pretrained, or tiny)") from None
    return model.to(device).eval(), tokenizer


class Palette:
    """Draws prefixes of one kind (Eq. 9). `draw(seeds)` gives one prefix a row, determined by the row's seed alone.

    source: "prior" z ~ N(0, I); a domain's name: z from that domain's Gaussian; "mixture": a domain drawn per prefix;
        "none": no prefix. Controls without a VAE: "noise", Gaussian rows scaled to the mean norm of real token
        embeddings; "gauss", rows from a Gaussian fitted to h. z: a fixed latent [k] or [L, k] instead of a draw.
    length: L, rows per prefix. tiled: one draw repeated L times, else L independent draws.
    table: the policy's embedding table [V, d]; the VAE must have been trained on it (ValueError if not).
    """

    def __init__(self, vae, table, source="prior", length=8, tiled=True, z=None):
        if length < 0:
            raise ValueError(f"the prefix length L must be 0 or more, not {length}")
        domains = vae.domains if vae is not None else []
        if source not in SOURCES and source not in domains:
            raise ValueError(f"unknown prefix source '{source}': choose one of {', '.join([*SOURCES, *domains])}")
        if vae is None and source not in ("none", "noise"):
            raise ValueError(f"the prefix source '{source}' needs a VAE: train one with vae.py")
        if vae is not None:
            vae.check_policy(table)
        self.vae, self.source, self.tiled, self.z = vae, source, tiled, z
        self.length = 0 if source == "none" else length
        self.width, self.device = table.shape[1], table.device
        # our choice: norm matched in expectation, E|row| = mean |token embedding|
        self.noise_std = table.float().norm(dim=-1).mean().item() / math.sqrt(self.width) if source == "noise" else 0.0

    def draw(self, seeds):
        """seeds: one int a prefix. Returns (rows, latents): lists of [L, d] and of [L or 1, k] (None for the controls).

        With L = 0 every prefix is None: the row starts with its prompt.
        """
        drawn = [self._draw_one(torch.Generator().manual_seed(seed)) if self.length else (None, None) for seed in seeds]
        return [rows for rows, _ in drawn], [z for _, z in drawn]

    @torch.no_grad()
    def _draw_one(self, generator):
        draws = 1 if self.tiled else self.length
        randn = lambda *shape: torch.randn(*shape, generator=generator)
        z = None
        if self.source == "noise":
            rows = randn(draws, self.width) * self.noise_std                                    # [draws, d]
        elif self.source == "gauss":
            rows = self.vae.mean + randn(draws, len(self.vae.gauss_factor)) @ self.vae.gauss_factor    # [draws, d]
        else:
            z = self.z.view(-1, self.vae.settings["latent"]) if self.z is not None else self._latents(randn, draws, generator)
            rows = self.vae.decode(z)                                                           # [draws, d]
        if rows.shape[0] not in (1, self.length):
            raise ValueError(f"a fixed z must have 1 or L = {self.length} rows, not {rows.shape[0]}")
        return rows.expand(self.length, -1).to(self.device), z                                  # [L, d], [draws, k]

    def _latents(self, randn, draws, generator):
        z = randn(draws, self.vae.settings["latent"])                                           # [draws, k]
        if self.source == "prior":
            return z
        domain = int(torch.randint(len(self.vae.domains), (), generator=generator)) if self.source == "mixture" \
            else self.vae.domains.index(self.source)
        return self.vae.domain_mean[domain] + z @ self.vae.domain_factor[domain]


FAMILIES = ("qwen3", "qwen2", "llama")
DROPPED = -1e30  # logit of a filtered token: exp gives exactly 0, and unlike -inf, 0 * DROPPED is not NaN (entropy)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Filters apply after the temperature, in transformers' order: top-k, top-p, min-p."""
    temperature: float = 1.0  # 0: greedy, filters are then ignored
    top_p: float = 1.0  # keep the likeliest tokens until their probability reaches top_p; 1: off
    top_k: int = 0  # keep the top_k likeliest tokens; 0: off
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest; 0: off
    max_new_tokens: int = 256

    def __post_init__(self):
        for name, good, want in (("temperature", self.temperature >= 0, "0 (greedy) or more"),
                                 ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
                                 ("top_k", self.top_k >= 0, "0 (off) or more"),
                                 ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
                                 ("max_new_tokens", self.max_new_tokens >= 1, "1 or more")):
            if not good:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}, but must be {want}.")


@dataclass
class Completion:
    ids: list[int]  # the end token included, when one was produced
    logprobs: list[float]  # of each id, under exactly the distribution it was drawn from (greedy: at temperature 1)
    finish: str  # "stop": an end token; "length": max_new_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def mix(z):
    """The splitmix64 finaliser (Steele et al. 2014) on int64 tensors: multiplication wraps, >> is masked to be unsigned."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ (z >> 31 & (1 << 33) - 1)


def uniform(seed, index):
    """Uniform numbers in [0, 1) by hashing int64 tensors seed and index (broadcast): no state, so no order to depend on."""
    bits = mix(mix(seed) + index * (0x9E3779B97F4A7C15 - (1 << 64)))
    # 23 bits, not 24: then u * total < total holds in fp32 even where total is a rounding error above 1.
    return (bits & (1 << 23) - 1).float() * 2.0 ** -23


def shape_logits(logits, sampling, chosen=None):
    """Logits [N, V] -> fp32 logits [N, V] of the distribution that is sampled; dropped tokens get DROPPED.

    chosen [N]: tokens that were sampled, kept even if rounding moved them across a filter's border since.
    """
    z = logits.float()
    if sampling.temperature == 0:
        return z
    if sampling.temperature != 1:
        z = z / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return z
    floor = torch.full_like(z[:, :1], DROPPED)  # [N, 1] the least logit that is kept
    if sampling.top_k:
        floor = z.topk(min(sampling.top_k, z.shape[1])).values[:, -1:]
    if sampling.top_p < 1:
        ranked = z.masked_fill(z < floor, DROPPED).sort(-1, descending=True).values
        probs = ranked.softmax(-1)
        kept = (probs.cumsum(-1) - probs < sampling.top_p).sum(-1, keepdim=True)  # [N, 1], at least 1
        floor = ranked.gather(1, kept - 1)
    if sampling.min_p:
        floor = torch.maximum(floor, z.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item())
    drop = z < floor
    if chosen is not None:
        drop.scatter_(1, chosen[:, None], False)
    return z.masked_fill(drop, DROPPED)


def sample(logits, u, sampling):
    """Logits [N, V] and uniform numbers u [N] -> tokens [N], log-probs [N]; the inverse CDF, one number per row."""
    probs = shape_logits(logits, sampling).softmax(-1)
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        cdf = probs.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # [N, 1], the first with cdf > u
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ---------------------------------------------------------------------------------------------------------------------
# Rows: what is scored or decoded

def check_rows(model, prompts, prefixes):
    """Refuse models and rows that would be read wrongly; prefixes come back as a list without empty ones."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type {config.model_type!r} is not served; the decoder reads {', '.join(FAMILIES)}.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("this model has sliding-window layers, which are not served; use a model with full attention.")
    if config.hidden_act != "silu" or model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        raise ValueError(f"activation {config.hidden_act} with {model.model.rotary_emb.rope_type} positions is not served; "
                         "use a model with silu and positions that do not change with the length.")
    prefixes = [None] * len(prompts) if prefixes is None else [p if p is not None and len(p) else None for p in prefixes]
    if len(prefixes) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(prefixes)} prefixes; give one (or None) per prompt.")
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty; a row needs at least one token after its prefix.")
        if prefix is not None and (prefix.dim() != 2 or prefix.shape[1] != config.hidden_size):
            raise ValueError(f"prefix {row} has shape {list(prefix.shape)}; this model takes [L, {config.hidden_size}].")
    return prefixes


def embed_rows(embed, ids, prefixes):
    """Token lists and their prefixes -> right-padded embeddings [B, T, d]."""
    tokens = torch.tensor([i for row in ids for i in row], dtype=torch.long, device=embed.weight.device)
    rows = embed(tokens).split([len(row) for row in ids])  # B x [len, d]
    rows = [x if p is None else torch.cat([p.to(x), x]) for x, p in zip(rows, prefixes)]
    return pad_sequence(rows, batch_first=True)


def micro_batches(lengths, max_tokens):
    """Split row numbers into groups of similar length, longest first, with rows x longest <= max_tokens in each.

    A row longer than max_tokens forms its own group. micro_batches([3, 9, 4], 9) -> [[1], [2, 0]].
    """
    groups = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

class Block(NamedTuple):
    """One layer's packed weights. A pair is (matrix [in, out], bias [out] or None)."""
    norm1: torch.Tensor  # [d]
    qkv: tuple  # d -> (H + 2 KV) D
    qk_norm: torch.Tensor | None  # [H + KV, D]
    out: tuple  # H D -> d
    norm2: torch.Tensor  # [d]
    gate_up: tuple  # d -> 2 ffn
    down: tuple  # ffn -> d


def pack(*linears):
    """Linears that read the same input -> one (matrix [in, out], bias) pair; a single one is not copied where avoidable."""
    weight = linears[0].weight if len(linears) == 1 else torch.cat([m.weight for m in linears])  # [out, in]
    bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
    # fp32 on CPU multiplies 1.1-2.4x faster with the input dimension first in memory
    first = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return weight.T.contiguous() if first else weight.T, bias


def linear(x, pair):
    """x [N, in] -> [N, out]; bf16 on CPU is 1.4-2.4x faster with the operands swapped."""
    weight, bias = pair
    y = (weight.T @ x.T).T if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x @ weight
    return y if bias is None else y + bias


class Decoder:
    """Batched generation for a Hugging Face Qwen3, Qwen2 or Llama model, from its own weights.

    slots: rows decoded at a time (None: as many as free CUDA memory holds). max_length: cache columns, prefix + prompt +
    new tokens (None: grown to what a call needs). eos_ids: end tokens (None: those of generation_config, else config;
    nothing else of generation_config is read). Call `refresh` when the weights have changed.
    """

    def __init__(self, model, eos_ids=None, slots=64, max_length=None):
        check_rows(model, [], None)
        config = model.config
        if eos_ids is None:
            eos_ids = getattr(model.generation_config, "eos_token_id", None)
            eos_ids = config.eos_token_id if eos_ids is None else eos_ids
        self.eos_ids = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids or ())
        self.model, self.max_slots, self.max_length = model, slots, max_length
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embed, self.device = model.get_input_embeddings(), model.get_input_embeddings().weight.device
        self.fixed = self.device.type == "cuda"  # few step sizes, ends read every 8 steps; the tests set it on CPU
        self.blocks, self.slots, self.columns, self.graphs = None, 0, 0, {}

    @torch.no_grad()
    def refresh(self):
        """Repack the module's current weights, in place, so that captured graphs see them."""
        fresh = []
        for layer in self.model.model.layers:
            a, m, qk = layer.self_attn, layer.mlp, None
            if hasattr(a, "q_norm"):
                qk = torch.cat([a.q_norm.weight.expand(self.heads, -1), a.k_norm.weight.expand(self.kv, -1)])
            fresh.append(Block(layer.input_layernorm.weight, pack(a.q_proj, a.k_proj, a.v_proj), qk, pack(a.o_proj),
                               layer.post_attention_layernorm.weight, pack(m.gate_proj, m.up_proj), pack(m.down_proj)))
        self.blocks = fresh
        self.head = pack(self.model.get_output_embeddings())
        self.graphs.clear()

    def release(self):
        """Give packed weights, cache and graphs back; the next generate makes them anew."""
        self.blocks = self.cache = self.head = None
        self.slots = self.columns = 0
        self.graphs.clear()

    def _reserve(self, columns, rows):
        """Allocate the cache and the per-slot state, unless what is there is large enough."""
        columns = max(columns if self.max_length is None else self.max_length, self.columns)
        layers, slots, weight = self.model.config.num_hidden_layers, self.max_slots, self.embed.weight
        if slots is None and self.device.type == "cuda":
            self.release()
            torch.cuda.empty_cache()
            per_slot = layers * 2 * columns * self.kv * self.dim * weight.element_size() + 24 * len(weight)
            slots = max(1, int(torch.cuda.mem_get_info(self.device)[0] * 0.8) // per_slot)
        slots = min(slots or 64, rows)
        if slots <= self.slots and columns <= self.columns:
            return
        self.graphs.clear()
        self.slots, self.columns = max(slots, self.slots), columns
        new = lambda *shape, dtype=torch.long: torch.zeros(self.slots, *shape, dtype=dtype, device=self.device)
        self.cache = None  # free the old one before the new one is made
        self.cache = new(layers, 2, columns, self.kv, self.dim, dtype=weight.dtype)
        self.token, self.pos, self.stop, self.live = new(), new(), new(), new(dtype=torch.bool)
        self.ids, self.logprobs, self.u = new(columns), new(columns, dtype=torch.float), new(columns, dtype=torch.float)
        self.slot, self.column = (torch.arange(k, device=self.device) for k in (self.slots, columns))
        self.is_end = torch.zeros(len(weight), dtype=torch.bool, device=self.device)
        self.is_end[list(self.eos_ids)] = True
        rotary = self.model.model.rotary_emb
        angle = self.column[:, None].float() * rotary.inv_freq.float().to(self.device)  # [columns, D / 2]
        cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
        self.cos = torch.cat([cos, cos], -1).to(weight.dtype)  # [columns, D]
        self.sin = torch.cat([-sin, sin], -1).to(weight.dtype)  # the sign of "rotate half" is in here

    def _norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.model.config.rms_norm_eps)

    def _layers(self, x, pos, attend):
        """Token rows x [N, d] at positions pos [N] -> hidden [N, d]; attend(layer, q, k, v) gets [N, heads, D]."""
        cos, sin = self.cos[pos].unsqueeze(1), self.sin[pos].unsqueeze(1)  # [N, 1, D]
        for i, b in enumerate(self.blocks):
            qkv = linear(self._norm(x, b.norm1), b.qkv).reshape(len(x), -1, self.dim)  # [N, H + 2 KV, D]
            qk, v = qkv[:, :-self.kv], qkv[:, -self.kv:]
            if b.qk_norm is not None:
                qk = self._norm(qk, None) * b.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin)  # rotary positions
            heads = attend(i, qk[:, :self.heads], qk[:, self.heads:], v)  # [N, H D]
            x = x + linear(heads, b.out)
            gate, up = linear(self._norm(x, b.norm2), b.gate_up).chunk(2, -1)  # [N, ffn] each
            x = x + linear(F.silu(gate) * up, b.down)
        return x

    def _prefill(self, jobs, slots):
        """Write keys and values of all but each job's last prompt token into its slot."""
        x = embed_rows(self.embed, [job.prompt[:-1] for job in jobs], [job.prefix for job in jobs])  # [n, T, d]
        n, T = x.shape[:2]
        slots = torch.tensor(slots, device=self.device)

        def attend(i, q, k, v):
            q, k, v = (t.reshape(n, T, -1, self.dim) for t in (q, k, v))
            self.cache[slots, i, 0, :T], self.cache[slots, i, 1, :T] = k, v  # what pads write is overwritten unread
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [n, heads, T, D]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(n * T, -1)

        self._layers(x.flatten(0, 1), self.column[:T].repeat(n), attend)

    def _step(self, n, width, sampling):
        """Read one token in each slot 0..n-1, sample the next, note it: fixed shapes, in place, no sync with the host."""
        slot, pos, live = self.slot[:n], self.pos[:n], self.live[:n]
        hidden_columns = self.column[:width] > pos[:, None]  # [n, width]
        mask = torch.zeros_like(hidden_columns, dtype=self.cache.dtype).masked_fill_(hidden_columns, -torch.inf)

        def attend(i, q, k, v):
            keys, values = self.cache[:n, i, 0], self.cache[:n, i, 1]  # [n, columns, KV, D]
            keys[slot, pos], values[slot, pos] = k, v
            keys, values = keys[:, :width].transpose(1, 2), values[:, :width].transpose(1, 2)  # [n, KV, width, D]
            q = q.reshape(n, self.kv, -1, self.dim)  # heads sharing a key head stand in for query positions
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None]).reshape(n, -1)

        x = self._layers(F.embedding(self.token[:n], self.embed.weight), pos, attend)  # [n, d]
        logits = linear(self._norm(x, self.model.model.norm.weight), self.head)  # [n, V]
        token, logprob = sample(logits, self.u[slot, pos], sampling)
        self.ids[slot, pos], self.logprobs[slot, pos], self.token[:n] = token, logprob, token
        pos += live  # an ended row stands still: it writes the same column, past its completion, until it is retired
        live &= ~self.is_end[token] & (pos < self.stop[:n])

    def _run(self, n, width, sampling):
        """One step; on CUDA a size's first step runs eagerly (loading kernels), its second is captured, then replayed."""
        if self.fixed:
            n, width = min(self.slots, 1 << (n - 1).bit_length()), min(self.columns, -(-width // 256) * 256)
        graph = self.graphs.get((n, width, sampling))
        if self.device.type != "cuda" or graph is None:
            self.graphs[n, width, sampling] = "seen"
            return self._step(n, width, sampling)
        if graph == "seen":
            graph = self.graphs[n, width, sampling] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(n, width, sampling)
        graph.replay()

    def _admit(self, new, jobs, sampling):
        """Put the jobs `new` into the slots after `jobs`, the live ones."""
        taken = slice(len(jobs), len(jobs) + len(new))
        donor = {job.key: slot for slot, job in enumerate(jobs)}  # a live row still holds its whole prompt
        for slot, job in enumerate(new, len(jobs)):
            donor.setdefault(job.key, slot)
        jobs += new
        fresh = [slot for slot in range(len(jobs))[taken] if donor[jobs[slot].key] == slot
                 and jobs[slot].length > 1]
        for group in micro_batches([jobs[slot].length - 1 for slot in fresh], 16384 if self.fixed else 1024):
            slots = [fresh[i] for i in group]
            self._prefill([jobs[slot] for slot in slots], slots)
        copies = [slot for slot in range(len(jobs))[taken] if donor[jobs[slot].key] != slot]
        if copies:
            T = max(jobs[slot].length for slot in copies)
            self.cache[copies, :, :, :T] = self.cache[[donor[jobs[slot].key] for slot in copies], :, :, :T]
        to = lambda values: torch.tensor(values, device=self.device)
        self.token[taken], self.live[taken] = to([job.prompt[-1] for job in new]), True
        self.pos[taken] = to([job.length - 1 for job in new])
        self.stop[taken] = self.pos[taken] + sampling.max_new_tokens
        self.u[taken] = uniform(to([job.seed for job in new])[:, None], self.column - self.pos[taken, None])  # [new, columns]

    def _retire(self, jobs, done):
        """Hand ended rows to done(job, completion) and close the gaps; returns (live jobs, their longest length)."""
        pos, live = torch.stack([self.pos[:len(jobs)], self.live[:len(jobs)]]).tolist()
        for slot, job in enumerate(jobs):
            if not live[slot]:
                new = slice(job.length - 1, pos[slot])
                ids = self.ids[slot, new].tolist()
                done(job, Completion(ids, self.logprobs[slot, new].tolist(), "stop" if ids[-1] in self.eos_ids else "length"))
        keep = [slot for slot in range(len(jobs)) if live[slot]]
        n, width = len(keep), max((pos[slot] for slot in keep), default=0)
        holes, movers = [slot for slot in range(n) if not live[slot]], [slot for slot in keep if slot >= n]
        if holes:
            self.cache[holes, :, :, :width] = self.cache[movers, :, :, :width]
            for state in (self.token, self.pos, self.stop, self.live, self.ids, self.logprobs, self.u):
                state[holes] = state[movers]
            for hole, mover in zip(holes, movers):
                jobs[hole] = jobs[mover]
        self.live[n:] = False
        return jobs[:n], width

    @torch.inference_mode()
    def generate(self, prompts, prefixes=None, sampling=Sampling(), seeds=None, progress=None):
        """Sample one completion per prompt, in the order given.

        prompts: token lists; prefixes: [L, d] tensors or None, per row; seeds: one int per row (None: drawn from torch's
        generator); progress: called with the number of rows that just ended.
        """
        prefixes = check_rows(self.model, prompts, prefixes)
        if seeds is None:
            seeds = torch.randint(2 ** 62, (len(prompts),)).tolist()
        queue, results = [], [None] * len(prompts)
        for row, (prompt, prefix, seed) in enumerate(zip(prompts, prefixes, seeds, strict=True)):
            key = (tuple(prompt), None if prefix is None else prefix.detach().float().cpu().numpy().tobytes())
            length = len(prompt) + (0 if prefix is None else len(prefix))
            if self.max_length and length + sampling.max_new_tokens > self.max_length:
                raise ValueError(f"row {row} may take {length} + {sampling.max_new_tokens} positions, but max_length is "
                                 f"{self.max_length}; shorten the prompt, lower max_new_tokens or raise max_length.")
            queue.append(Job(row, prompt, prefix, key, length, seed % 2 ** 63))
        if not queue:
            return []
        self._reserve(max(job.length for job in queue) + sampling.max_new_tokens, len(queue))
        if self.blocks is None:
            self.refresh()
        first = {}
        for job in queue:
            first.setdefault(job.key, job.row)
        queue = deque(sorted(queue, key=lambda job: (-job.length, first[job.key])))  # similar lengths, groups together
        jobs, width, every = [], 0, 8 if self.fixed else 1

        def done(job, completion):
            results[job.row] = completion

        while queue or jobs:
            free = self.slots - len(jobs)
            if queue and free >= max(1, self.slots // 8):
                self._admit([queue.popleft() for _ in range(min(free, len(queue)))], jobs, sampling)
                width = max(width, max(job.length for job in jobs) - 1)
            for i in range(every):
                self._run(len(jobs), width + i + 1, sampling)
            before = len(jobs)
            jobs, width = self._retire(jobs, done)
            if progress and len(jobs) < before:
                progress(before - len(jobs))
        return results


class Job(NamedTuple):
    """A row waiting for or living in a slot. key: equal for rows with equal prompt and prefix."""
    row: int
    prompt: list
    prefix: torch.Tensor | None
    key: tuple
    length: int  # prefix + prompt
    seed: int


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs for training

class HeadLogProb(torch.autograd.Function):
    """log p(target) and entropy from hidden [N, d] and the head's weight [V, d], a few rows of logits at a time.

    The backward makes each chunk's logits again rather than keeping them: one more product, but [chunk, V] of memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, sampling, with_entropy):
        ctx.sampling, ctx.chunk = sampling, max(1, 2 ** 25 // len(weight))  # 128 MB of fp32 logits
        norm, logprobs, entropy = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for rows in torch.arange(len(hidden)).split(ctx.chunk):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            z = shape_logits(hidden[rows] @ weight.T, sampling, targets[rows])  # [chunk, V]
            norm[rows] = z.logsumexp(-1)
            logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - norm[rows]
            if with_entropy:
                entropy[rows] = norm[rows] - torch.linalg.vecdot((z - norm[rows, None]).exp_(), z)
        ctx.save_for_backward(hidden, weight, targets, norm)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, norm = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad / (ctx.sampling.temperature or 1)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            z = shape_logits(hidden[rows] @ weight.T, ctx.sampling, targets[rows])
            z = (z - norm[rows, None]).exp_().neg_()  # d logprob / d logits is onehot(target) - p
            z.scatter_add_(1, targets[rows, None], torch.ones_like(norm[rows, None]))
            z = z.mul_(grad[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = z @ weight
            if grad_weight is not None:
                grad_weight.addmm_(z.T, hidden[rows])
        return grad_hidden, grad_weight, None, None, None


def completion_logprobs(model, prompts, completions, prefixes, sampling=Sampling(), with_entropy=True):
    """Log-probs [N] and entropies [N] of all N completion tokens, row after row, by the Hugging Face module (autograd).

    Gradients reach the model's weights and the prefixes; the entropy (None without with_entropy) is a plain number.
    The distribution is the one `sampling` draws from. Memory is for [rows, longest, d] hidden states, never for logits:
    split long batches by micro_batches first.
    """
    prefixes = check_rows(model, prompts, prefixes)
    # The last token is predicted but never read. Right pads come after all that counts, so causality hides them.
    x = embed_rows(model.get_input_embeddings(), [(list(p) + list(c))[:-1] for p, c in zip(prompts, completions)], prefixes)
    hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state  # [B, T, d]
    places = [(row, len(prompt) + (0 if prefix is None else len(prefix)) - 1 + i)
              for row, (prompt, completion, prefix) in enumerate(zip(prompts, completions, prefixes))
              for i in range(len(completion))]
    row, column = torch.tensor(places, dtype=torch.long, device=x.device).reshape(-1, 2).T
    targets = torch.tensor([i for c in completions for i in c], dtype=torch.long, device=x.device)  # [N]
    hidden, weight = hidden[row, column], model.get_output_embeddings().weight  # [N, d], [V, d]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    logprobs, entropy = HeadLogProb.apply(hidden, weight, targets, sampling, with_entropy)
    return logprobs, entropy if with_entropy else None
