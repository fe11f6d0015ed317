"""The latent space of reasoning strategies: a VAE over mean-pooled token embeddings of worked answers (Sec. 3.2).

A trace (a question with a worked answer) becomes one vector h, the mean of its raw token embeddings (Eq. 5). A small VAE
squeezes h through a latent z of a few numbers (Eq. 6-8). Afterwards any z ~ N(0, I) decodes to a vector that reads like one
pseudo-token in the style of some trace, and a Gaussian fitted to the latents of one domain draws that domain's style.

Departs from the paper (which leaves these open): latent width k = 8; h is centred and divided by one scalar, its overall
standard deviation, so that the loss means the same for every model; beta = 1; one hidden layer of 128. Beside the VAE we
fit a plain Gaussian to h, the control that tells what the VAE itself adds.

For a vision-language model (Sec. 4.1) q holds the image's visual tokens too, and the decoder is a small causal transformer: z,
seen as 8 parts, becomes 8 prefix rows at once (`--decoder gpt`). How it is trained is our choice: as the decoder of the same VAE,
row l reconstructing the mean of the l-th eighth of a trace (pool_parts says why not the whole of it).

Run it (writes vae.safetensors, config.json, metrics.jsonl, latents.safetensors, latents.png into --out):
    python vae.py                                                    # the tiny world (its base model is made first)
    python vae.py --model tiny-vl                                    # the tiny world of drawn scenes, GPT decoder
    python vae.py --model Qwen/Qwen3-0.6B-Base --out runs/qwen/vae \\
        --traces math=hub:meta-math/MetaMathQA code=traces_code.jsonl qa=traces_qa.jsonl
"""
import argparse
import base64
import io
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# the embedded defaults: run folders of `sft.py pretrain`, each with policy/ and traces.jsonl
TINY_BASES = {"tiny": "runs/tiny/base", "tiny-vl": "runs/tiny-vl/base"}


# ---- traces -------------------------------------------------------------------------------------------------------------

def check_traces(specs, limit):
    """Read the local sources, for what load_traces would raise: before a base model is made, not after it."""
    made = {f"{base}/traces.jsonl" for base in TINY_BASES.values()}                     # by find_model
    load_traces([spec for spec in specs or () if spec not in made and not spec.rpartition("=")[2].startswith("hub:")], limit)


def load_traces(specs, limit=2000):
    """Worked answers by domain, as rows {question, answer, domain}.

    specs: each "DOMAIN=SOURCE", or a bare SOURCE whose rows name their domain. SOURCE is a JSONL file or
    "hub:DATASET[:CONFIG[:SPLIT]]" (streamed). limit: rows kept per source.
    Raises ValueError naming the file and line of a malformed row, or the domain without rows.
    """
    traces = []
    for spec in specs:
        domain, equals, source = spec.partition("=")
        domain, source = (domain, source) if equals else (None, spec)
        read = _hub_traces if source.startswith("hub:") else _jsonl_traces
        rows = list(itertools.islice(read(source, domain), limit))
        if not rows:
            raise ValueError(f"{source}: no traces in it{f' for domain {domain!r}' if domain else ''}; every domain needs some")
        traces += rows
    return traces


def _jsonl_traces(source, domain):
    if not Path(source).is_file():
        raise ValueError(f"no such file: {source} (traces are JSONL rows of {{question, answer, domain}})")
    with open(source, "rb") as file:            # lines of bytes end at "\n" alone; str.splitlines would cut at U+2028 too
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:     # not JSON, or not UTF-8
                    raise ValueError(f"{source}, line {number}: not JSON ({error})") from None
                if isinstance(row, dict) and isinstance(row.get("image"), str) and not row["image"].startswith("data:"):
                    row["image"] = str(Path(source).parent / row["image"])         # a path is relative to its file
                yield _trace(f"{source}, line {number}", row, domain)


def _hub_traces(source, domain):
    """Rows of a hub set are not ours to mend: those without question or answer (1% of ShareGPT) are left out."""
    from datasets import load_dataset           # only here: a local run needs neither the package nor a network
    name, config, split = (source[4:].split(":") + ["", ""])[:3]
    for number, row in enumerate(load_dataset(name, config or None, split=split or "train", streaming=True)):
        try:
            yield _trace(f"{source}, row {number}", row, domain)
        except ValueError:
            if number == 0:                     # the very first: the set has other fields than we know
                raise


def _trace(where, row, domain):
    """Bring one raw row to {question, answer, domain}; hub sets name these fields in several ways."""
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("conversations"), list):                  # ShareGPT: the first human turn that is answered
        turns = row["conversations"]
        row = next(({"question": a.get("value"), "answer": b.get("value")} for a, b in zip(turns, turns[1:])
                    if (a.get("from"), b.get("from")) == ("human", "gpt")), {})
    pick = lambda *names: next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
    question = pick("question", "query", "problem", "prompt", "instruction")
    answer = pick("answer", "response", "solution", "output", "content")
    domain = domain or pick("domain")
    if answer is None or domain is None:
        raise ValueError(f"{where}: no '{'answer' if answer is None else 'domain'}' with text in it; "
                         "a trace is {question, answer, domain} (or give the domain as DOMAIN=FILE)")
    image = {"image": row["image"]} if row.get("image") is not None else {}
    return {"question": question or "", "answer": answer, "domain": domain, **image}     # CodeParrot rows are answers alone


# ---- h: one vector per trace --------------------------------------------------------------------------------------------

def find_model(name):
    """What `transformers` should load for `name`: a hub name, a folder, the finished policy of a run folder, "tiny" or "tiny-vl".

    The last two are the embedded defaults, made on the spot where they are missing: by `sft.py pretrain` in a process of its
    own, because this file stands below sft.py and imports none of it.
    """
    name = TINY_BASES.get(name, name)
    if name in TINY_BASES.values() and not (Path(name) / "policy" / "config.json").is_file():
        world = next(world for world, base in TINY_BASES.items() if base == name)
        print(f"building {name}: python sft.py pretrain --model {world} --resume", flush=True)
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        script = str(Path(__file__).with_name("sft.py"))
        subprocess.run([sys.executable, script, "pretrain", "--model", world, "--resume"], check=True, env=alone)
    policy = Path(name) / "policy"
    return str(policy) if (policy / "config.json").is_file() else name


def load_embeddings(name):
    """The tokenizer and the token-embedding table E [V, d] (fp32) of a model: all the VAE needs of it.

    Of a vision-language model the tokenizer is a Processor with a method more, see: image -> the rows [n, d] that the vision
    tower puts into a prompt for it.
    """
    name = find_model(name)
    try:
        model, tokenizer = model_class(name).from_pretrained(name, dtype=torch.float32), read_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model '{name}': {reason(error)} (give a hub name, "
                         "a folder written by save_pretrained, or tiny)") from None
    if isinstance(tokenizer, Processor):
        tokenizer.see = lambda source: see_images(model, [tokenizer.read(source)])[0]
    return tokenizer, model.get_input_embeddings().weight.detach()


def model_class(name):
    """The class of transformers that loads this model: text, or image and text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging
    logging.disable_progress_bar()              # loading a shard needs no bar of its own
    vision = getattr(AutoConfig.from_pretrained(name), "vision_config", None)
    return AutoModelForImageTextToText if vision is not None else AutoModelForCausalLM


def read_tokenizer(name):
    """The tokenizer of a text model, or the Processor of a vision-language model."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import cached_file
    tokenizer = AutoTokenizer.from_pretrained(name)
    if getattr(AutoConfig.from_pretrained(name), "vision_config", None) is None:
        return tokenizer
    return Processor(tokenizer, **json.loads(Path(cached_file(name, "preprocessor_config.json")).read_text()))


# ---- images (vision-language models) ------------------------------------------------------------------------------------

Pixels = namedtuple("Pixels", "patches grid")   # what a vision tower reads: [gh gw, 3 temporal patch patch], (1, gh, gw)


class Processor:
    """The tokenizer of a Qwen2-VL or Qwen2.5-VL that also reads images; all the rest is the tokenizer's own.

    Pillow and numpy alone, bit for bit what transformers' Qwen2VLImageProcessorPil makes (its other processors need
    torchvision). settings: those of preprocessor_config.json.
    """
    DEFAULTS = dict(patch_size=14, merge_size=2, temporal_patch_size=2, image_mean=[0.48145466, 0.4578275, 0.40821073],
                    image_std=[0.26862954, 0.26130258, 0.27577711], size=dict(shortest_edge=56 * 56, longest_edge=28 * 28 * 1280))

    def __init__(self, tokenizer, min_pixels=None, max_pixels=None, **settings):
        self.tokenizer, self.settings = tokenizer, {name: settings.get(name) or value for name, value in self.DEFAULTS.items()}
        low, high = (self.settings["size"].get(edge) for edge in ("shortest_edge", "longest_edge"))
        self.settings["size"] = dict(shortest_edge=min_pixels or low, longest_edge=max_pixels or high)

    def __getattr__(self, name):
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        write_text(Path(folder) / "preprocessor_config.json",
                   json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **self.settings}, indent=1))

    def read(self, source):
        """The Pixels of an image (see open_image): resized to whole patches, normalised, cut into patches."""
        patch, merge = self.settings["patch_size"], self.settings["merge_size"]
        image = open_image(source)
        image = image.resize(self.resized(*image.size), 3)                                      # 3: bicubic
        x = np.asarray(image, np.float32) / 255                                                 # [H, W, 3]
        x = (x - np.float32(self.settings["image_mean"])) / np.float32(self.settings["image_std"])
        gh, gw = x.shape[0] // patch, x.shape[1] // patch
        x = x.transpose(2, 0, 1).reshape(3, gh // merge, merge, patch, gw // merge, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        x = np.repeat(x[:, :, :, :, :, None], self.settings["temporal_patch_size"], axis=5)    # a still picture, seen so often
        return Pixels(torch.from_numpy(np.ascontiguousarray(x.reshape(gh * gw, -1))), (1, gh, gw))

    def resized(self, width, height):
        """(width, height) in whole merged patches, near the old ones, its area between size's two bounds."""
        unit = self.settings["patch_size"] * self.settings["merge_size"]
        low, high = self.settings["size"]["shortest_edge"], self.settings["size"]["longest_edge"]
        if max(width, height) > 200 * min(width, height):
            raise ValueError(f"an image of {width} x {height} pixels is over 200 times as long as wide: crop it")
        w, h = (round(side / unit) * unit for side in (width, height))
        if w * h > high:
            w, h = (max(unit, math.floor(side / math.sqrt(width * height / high) / unit) * unit) for side in (width, height))
        elif w * h < low:
            w, h = (math.ceil(side * math.sqrt(low / (width * height)) / unit) * unit for side in (width, height))
        return w, h


def open_image(source):
    """An RGB Pillow image from a Pillow image, a path, a data URI, or the bytes of a file.

    Raises ValueError in one sentence for a missing, damaged or huge image (a file of a few KB can unpack to gigabytes:
    beyond Pillow's MAX_IMAGE_PIXELS, about 89 million pixels, it is refused unread).
    """
    from PIL import Image                       # only here: a text model needs no Pillow
    name = source[:60] if isinstance(source, str) else "(in memory)"
    try:
        if isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2], validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            return (Image.open(file) if isinstance(source, (str, bytes)) else source).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image: {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the image {name} is too large: {error}; make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:         # what Pillow raises for a damaged file depends on its kind
        raise ValueError(f"the image {name} cannot be read ({error})") from None


def see_images(model, images):
    """A list of Pixels -> a list of visual token embeddings [n_i, d], by the model's vision tower, all at once."""
    tower = model.model.visual
    patches = torch.cat([image.patches for image in images]).to(tower.device, tower.dtype)
    grid = torch.tensor([image.grid for image in images], device=tower.device)
    return list(model.model.get_image_features(patches, grid).pooler_output)


@torch.no_grad()
def mean_pool(traces, tokenizer, table):
    """h = mean over the tokens of [question; answer] of E (Eq. 5). Returns [N, d]. No chat template, no special tokens.

    table: E [V, d]. embedding_bag means without building the [N, T, d] tensor of all embeddings.
    """
    ids = tokenizer([f"{trace['question']} {trace['answer']}".strip() for trace in traces],
                    add_special_tokens=False)["input_ids"]
    for trace, row in zip(traces, ids):
        if not row:
            raise ValueError(f"a trace of domain {trace['domain']!r} has no tokens: {str(trace)[:80]}")
    starts = torch.tensor([0] + [len(row) for row in ids[:-1]]).cumsum(0)                          # [N]
    flat = torch.tensor([token for row in ids for token in row])
    return nn.functional.embedding_bag(flat, table.float().cpu(), starts, mode="mean")             # [N, d]


@torch.no_grad()
def pool_parts(traces, tokenizer, table, rows=8, whole=False):
    """h of traces with images, for a decoder of `rows` prefix rows: [N, rows * d]. See mean_pool, which is the case rows = 1.

    A trace is the sequence [visual tokens; question; answer] of embeddings (Sec. 4.1 counts the image to q). What the rows
    stand for is our choice: row l is the mean of the l-th of `rows` equal parts of the sequence, so early rows speak of the
    picture and late ones of the answer. whole: every row is the mean of all, as Eq. 5 has it; but visual tokens are many and far
    longer than words, so that mean says next to nothing of the answer (in tiny-vl it steers nothing: tutorials/09).
    """
    parts = []
    for trace in traces:
        ids = tokenizer(f"{trace['question']} {trace['answer']}".strip(), add_special_tokens=False)["input_ids"]
        x = table[torch.tensor(ids, dtype=torch.long)].float().cpu()                               # [T, d]
        if trace.get("image") is not None:
            if not isinstance(tokenizer, Processor):
                raise ValueError("a trace has an image, but this model reads text only: use a Qwen2-VL or Qwen2.5-VL")
            x = torch.cat([tokenizer.see(trace["image"]).float().cpu(), x])
        if not len(x):
            raise ValueError(f"a trace of domain {trace['domain']!r} has no tokens: {str(trace)[:80]}")
        cuts = [l * len(x) // rows for l in range(rows + 1)]
        means = [x.mean(0) if whole else x[a:max(b, a + 1)].mean(0) for a, b in zip(cuts, cuts[1:])]
        parts.append(torch.cat(means))
    return torch.stack(parts)


# ---- the VAE ------------------------------------------------------------------------------------------------------------

class GPTDecoder(nn.Module):
    """The prefix decoder of Sec. 4.1: z [..., k], seen as `rows` tokens of width k / rows (the paper's 8 x 128), through a small
    causal transformer -> [..., rows * d]. Row l sees the parts of z up to l. Two layers, four heads: our choice."""

    def __init__(self, width, latent, hidden, rows, layers=2):
        super().__init__()
        if latent % rows or hidden % 4:
            raise ValueError(f"the GPT decoder needs --latent to be a multiple of {rows} (its rows), --hidden one of 4 (its "
                             f"heads), not {latent} and {hidden}")
        self.rows, self.enter, self.leave = rows, nn.Linear(latent // rows, hidden), nn.Linear(hidden, width)
        self.position = nn.Parameter(0.02 * torch.randn(rows, hidden))
        block = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.register_buffer("future", torch.full((rows, rows), -torch.inf).triu(1), persistent=False)

    def forward(self, z):
        x = self.enter(z.reshape(-1, self.rows, z.shape[-1] // self.rows)) + self.position         # [N, rows, hidden]
        return self.leave(self.blocks(x, mask=self.future)).reshape(*z.shape[:-1], -1)             # [..., rows * d]


class VAE(nn.Module):
    """Encoder h -> (mu, log sigma^2), decoder z -> h_hat: two MLPs with one hidden layer (Eq. 6, 7).

    width: d of the policy's embedding table. latent: k. hidden: our choice, 128. Standardisation lives inside: `encode`
    takes and `decode` gives vectors in the space of token embeddings. rows: prefix rows that one z makes; with more than one h
    is `rows` vectors in a row, [rows * d], and the decoder a GPTDecoder (Sec. 4.1).
    After training it also carries, as buffers, the Gaussian of every domain in latent space, the Gaussian of h, and a few
    rows of E by which a policy is recognised.
    """

    def __init__(self, width, latent=8, hidden=128, domains=(), gauss_rank=0, anchors=0, rows=1):
        super().__init__()
        self.latent, self.domains, self.rows, self.width = latent, list(domains), rows, width
        self.settings = dict(width=width, latent=latent, hidden=hidden, domains=self.domains, gauss_rank=gauss_rank,
                             anchors=anchors, rows=rows)
        self.encoder = nn.Sequential(nn.Linear(rows * width, hidden), nn.GELU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, width)) if rows == 1 else \
            GPTDecoder(width, latent, hidden, rows)
        shapes = {"mean": (rows * width,), "scale": (rows * width,) if rows > 1 else (),
                  "domain_mean": (len(self.domains), latent),
                  "domain_factor": (len(self.domains), latent, latent), "gauss_factor": (gauss_rank, rows * width),
                  "anchor_rows": (anchors, width)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def encode(self, h):
        """h [N, rows * d] -> mu [N, k], log sigma^2 [N, k]."""
        return self.encoder((h - self.mean) / self.scale).chunk(2, dim=-1)

    def decode(self, z):
        """z [..., k] -> h_hat [..., rows * d]: pseudo-token embeddings."""
        return self.decoder(z) * self.scale + self.mean

    def loss(self, h, beta, generator):
        """(reconstruction, KL per dimension [k], total) of Eq. 8, in units of the standardised h, means over the batch."""
        mu, log_var = self.encode(h)
        z = mu + torch.exp(log_var / 2) * torch.randn(mu.shape, generator=generator)
        target = (h - self.mean) / self.scale
        reconstruction = (self.decoder(z) - target).pow(2).sum(-1).mean()
        kl = 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).mean(0)                       # [k]
        return reconstruction, kl, reconstruction + beta * kl.sum()

    def check_policy(self, table):
        """Raises ValueError unless `table` [V, d] is the embedding table this VAE was trained on, up to fine-tuning."""
        if table.shape[1] != self.width:
            raise ValueError(f"this VAE decodes to width {self.width}, the policy's embeddings have width "
                             f"{table.shape[1]}: train a VAE for this policy with vae.py --model")
        rows = table[_anchor_index(len(table), len(self.anchor_rows))].float().cpu()
        drift = (rows - self.anchor_rows).norm() / self.anchor_rows.norm()
        if not drift < 0.5:                     # fine-tuning moves E by a few per cent, another table is about 1.4 away
            raise ValueError(f"this VAE was trained on another embedding table (relative distance {drift:.2f}): "
                             "train a VAE for this policy with vae.py --model")

    def save(self, folder, **notes):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "vae.safetensors.tmp")
        os.replace(folder / "vae.safetensors.tmp", folder / "vae.safetensors")
        # last, as its presence says that the VAE is complete
        write_text(folder / "config.json", json.dumps({"vae": self.settings, **notes}, indent=1))

    @classmethod
    def load(cls, folder):
        """A trained VAE from its folder. Raises ValueError in one sentence if it is missing or damaged."""
        folder = Path(folder)
        try:
            vae = cls(**json.loads((folder / "config.json").read_text())["vae"])
            vae.load_state_dict(load_file(folder / "vae.safetensors"))
        except FileNotFoundError:
            raise ValueError(f"no VAE in {folder}: train one with vae.py --out {folder}") from None
        except Exception as error:              # safetensors, json and torch each raise their own kind for a damaged file
            raise ValueError(f"the VAE in {folder} cannot be read ({reason(error)}): train it again") from None
        return vae.eval().requires_grad_(False)


def find_vae(folder, model):
    """The VAE in `folder`; that of a tiny world is trained on the spot where it is missing."""
    for world, base in TINY_BASES.items():
        if Path(model).resolve() == (Path(base) / "policy").resolve() and not (Path(folder) / "config.json").is_file():
            print(f"building {folder}: python vae.py --model {world} --out {folder}", flush=True)
            main(["--model", world, "--out", str(folder)])
    return VAE.load(folder)


def _anchor_index(rows, count):
    return torch.linspace(0, rows - 1, count).long()


def write_text(path, text):
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _gaussian_factor(covariance):
    """A [r, d] with A^T A = covariance: eps [r] ~ N(0, I) gives eps @ A ~ N(0, covariance). Rank-deficient is fine."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()).T.contiguous()


# ---- training -----------------------------------------------------------------------------------------------------------

def train_vae(traces, tokenizer, table, out, latent=8, hidden=128, beta=1.0, epochs=60, batch=128, lr=2e-3, seed=0, rows=1,
              whole=False, **notes):
    """Train on h of all traces but every tenth (held out), fit the Gaussians, save to `out`. Returns the VAE.

    Learning stays on the CPU: 5,000 vectors through two small MLPs take seconds there. rows, whole: those of
    pool_parts. notes: kept in config.json.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)               # written last: without it there is no VAE here
    generator = torch.Generator().manual_seed(seed)
    domains = sorted({trace["domain"] for trace in traces})
    h = mean_pool(traces, tokenizer, table) if rows == 1 and not isinstance(tokenizer, Processor) else \
        pool_parts(traces, tokenizer, table, rows, whole)                                  # [N, rows * d]
    held = torch.arange(len(h)) % 10 == 9
    if not held.any():
        raise ValueError(f"{len(traces)} traces are too few for a VAE: give at least 10")
    centred = h[~held] - h[~held].mean(0)
    rank = min(256, *centred.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(table.shape[1], latent, hidden, domains, rank, min(64, len(table)), rows)
    vae.mean.copy_(h[~held].mean(0))
    if rows == 1:
        vae.scale.copy_(centred.pow(2).mean().sqrt())
    else:       # one for each row: visual tokens can be 50 times as long as words, and would be all that is reconstructed
        vae.scale.copy_(centred.view(-1, rows, vae.width).pow(2).mean((0, 2)).sqrt().repeat_interleave(vae.width))
    # the control "gauss": N(mean h, cov h) from the first 256 principal directions, without any VAE
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    vae.gauss_factor.copy_(singular[:rank, None] * directions[:rank] / math.sqrt(max(1, len(centred) - 1)))
    vae.anchor_rows.copy_(table[_anchor_index(len(table), len(vae.anchor_rows))])
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    with open(out / "metrics.jsonl", "w") as log:
        for epoch in tqdm(range(epochs), desc="vae", leave=False):
            for rows in h[~held][torch.randperm(int((~held).sum()), generator=generator)].split(batch):
                _, _, total = vae.loss(rows, beta, generator)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            with torch.no_grad():
                reconstruction, kl, total = vae.loss(h[held], beta, torch.Generator().manual_seed(0))
            log.write(json.dumps({"epoch": epoch + 1, "held_out_reconstruction": reconstruction.item(),
                                  "held_out_kl": kl.sum().item(), "held_out_loss": total.item()}) + "\n")
    vae.eval().requires_grad_(False)
    labels = torch.tensor([domains.index(trace["domain"]) for trace in traces])
    fit_domains(vae, h, labels)
    mu, _ = vae.encode(h)
    save_file({"mu": mu.contiguous(), "domain": labels}, out / "latents.safetensors")
    vae.save(out, report=report(vae, h[held], table), **notes)
    return vae


@torch.no_grad()
def fit_domains(vae, h, labels):
    """One Gaussian per domain over its traces' latents (Sec. 3.3): the moments of z ~ q(z|h), h [N, d], labels [N].

    Mean of mu; covariance of mu plus the mean of sigma^2, which is what sampling z for ever would give.
    """
    mu, log_var = vae.encode(h)
    for i, domain in enumerate(vae.domains):
        own = labels == i
        if own.sum() < 2:
            raise ValueError(f"domain '{domain}' has {int(own.sum())} trace: a Gaussian needs at least 2")
        vae.domain_mean[i] = mu[own].mean(0)
        vae.domain_factor[i] = _gaussian_factor(torch.cov(mu[own].T) + torch.diag(log_var[own].exp().mean(0)))


@torch.no_grad()
def report(vae, h, table):
    """The figures that would betray a collapsed posterior, on held-out h [N, d]; squared errors per vector, standardised.

    active_units counts latent dimensions whose mean varies with the input: Var(mu) > 0.01 (Burda et al. 2016).
    reconstruction beside predict_the_mean: equal means that the latent carries nothing.
    """
    mu, _ = vae.encode(h)
    reconstruction, kl, _ = vae.loss(h, 1.0, torch.Generator().manual_seed(0))
    decoded = vae.decode(torch.randn(2000, mu.shape[1], generator=torch.Generator().manual_seed(1)))
    return {"reconstruction": round(reconstruction.item(), 4),
            "predict_the_mean": round(((h - vae.mean) / vae.scale).pow(2).sum(-1).mean().item(), 4),
            "kl_per_dimension": [round(value, 3) for value in kl.tolist()] if len(kl) <= 16 else round(kl.sum().item(), 3),
            "active_units": int((mu.var(0) > 0.01).sum()) if len(mu) > 1 else 0,
            "decoded_prefix_norm": round(decoded.view(-1, vae.width).norm(dim=-1).mean().item(), 4),
            "h_norm": round(h.view(-1, vae.width).norm(dim=-1).mean().item(), 4),
            "token_embedding_norm": round(table.float().norm(dim=-1).mean().item(), 4)}


# ---- pictures (Fig. 3) --------------------------------------------------------------------------------------------------

def pca(x, components=2):
    """x [N, d] centred and projected on its first principal directions: [N, components]."""
    centred = x - x.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False)[2][:components].T


def draw_latents(vae, folder, per_domain=100):
    """latents.png: latents and decoded prefixes of every domain, by PCA, and by t-SNE where scikit-learn is at hand."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print('no picture of the latents: matplotlib is missing (pip install -e ".[plots]")')
        return None
    latents = load_file(Path(folder) / "latents.safetensors")
    keep = torch.cat([(latents["domain"] == i).nonzero()[:per_domain, 0] for i in range(len(vae.domains))])
    mu, labels = latents["mu"][keep], latents["domain"][keep]
    views = [(f"PCA of {what}", pca(x)) for what, x in (("latents", mu), ("decoded prefixes", vae.decode(mu)))]
    try:
        from sklearn.manifold import TSNE
        near = min(30, len(mu) // 4)
        views += [(f"t-SNE of {what}", torch.from_numpy(TSNE(perplexity=near, random_state=0).fit_transform(x.numpy())))
                  for what, x in (("latents", mu), ("decoded prefixes", vae.decode(mu)))] if near > 1 else []
    except ImportError:
        print('no t-SNE: scikit-learn is missing (pip install -e ".[plots]")')
    figure, axes = pyplot.subplots(1, len(views), figsize=(4 * len(views) + 1, 3.8), layout="constrained")
    for axis, (title, points) in zip(axes, views):
        for i, domain in enumerate(vae.domains):
            color, marker = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")[i % 4], "os^D"[i % 4]      # for every eye (Okabe and Ito)
            axis.scatter(*points[labels == i].T, s=12, alpha=0.7, color=color, marker=marker, label=domain)
        axis.set(title=title, xticks=[], yticks=[])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(Path(folder) / "latents.png", dpi=120)
    pyplot.close(figure)
    return Path(folder) / "latents.png"


# ---- command line -------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The flags; exits with status 2 and one sentence where they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, "data",
              model=("tiny", "whose embeddings: hub name, folder, tiny or tiny-vl"),
              traces=([str], "JSONL files or hub:DATASET[:CONFIG[:SPLIT]] (default: the tiny world's own)", "[DOMAIN=]SOURCE"),
              limit=(2000, "traces kept per source", 1),
              out=(str, "folder of the VAE (default: runs/MODEL/vae for tiny and tiny-vl, needed otherwise)"),
              overwrite=(False, "replace a VAE of other settings in --out"))
    add_flags(parser, "model",
              decoder=(str, "mlp: one row for each z (Eq. 7); gpt: 8 rows (Sec. 4.1) (default: gpt for a vision-language model, "
                       "mlp otherwise)", ("mlp", "gpt")),
              whole=(False, "of gpt: every row stands for the whole trace, not for its eighth"),
              latent=(int, "latent width k (default: 8 for mlp; for gpt 1024, or d where that is less)", 1),
              hidden=(128, "width of the hidden layers", 1),
              beta=(1.0, "weight of the KL term, Eq. 8", 0))
    add_flags(parser, "training",
              epochs=(int, "passes over the traces (default: 60 for mlp, 30 for gpt)", 1),
              batch=(128, "traces per update", 1),
              lr=(2e-3, "Adam's learning rate", 0),
              seed=(0, "seed of weights, batches and noise"))
    args = parser.parse_args(argv)
    if args.model not in TINY_BASES and not (args.traces and args.out):
        parser.error("--traces and --out are needed for a model other than tiny or tiny-vl")
    args.out = args.out or f"runs/{args.model}/vae"
    return tiny_defaults(args)


def tiny_defaults(args):
    """Spell out what `--model tiny` means: the settings that are kept then equal those of grpo.py's own stages."""
    if args.model in TINY_BASES:
        args.model = TINY_BASES[args.model]
        if not args.traces:
            args.traces, args.limit = [f"{args.model}/traces.jsonl"], 10**9
    return args


def model_defaults(args):
    """Fill in the flags whose defaults depend on the model, from its config alone."""
    if None in (args.decoder, args.latent, args.epochs):
        from transformers import AutoConfig
        try:
            config = AutoConfig.from_pretrained(find_model(args.model))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model '{args.model}': {reason(error)} (give a hub name, "
                             "a folder written by save_pretrained, or tiny)") from None
        args.decoder = args.decoder or ("mlp" if getattr(config, "vision_config", None) is None else "gpt")
        wide, long = (8, 60) if args.decoder == "mlp" else (min(1024, config.get_text_config().hidden_size), 30)
        args.latent, args.epochs = args.latent or wide, args.epochs or long
    return args


def main(argv=None):
    """Train the VAE that the flags describe, or say that it is there."""
    args = model_defaults(parse_args(argv))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite")}
    known = Path(args.out) / "config.json"
    if known.is_file() and not args.overwrite:
        require_same(f"{args.out} holds a VAE trained", read_json(known).get("settings", {}), settings, "--overwrite to replace it")
        return print(f"using {args.out}")
    check_traces(args.traces, args.limit)
    name = find_model(args.model)
    traces = load_traces(args.traces, args.limit)
    tokenizer, table = load_embeddings(name)
    vae = train_vae(traces, tokenizer, table, args.out, args.latent, args.hidden, args.beta, args.epochs, args.batch, args.lr,
                    args.seed, 8 if args.decoder == "gpt" else 1, args.whole, settings=settings)
    print(json.dumps(json.loads((Path(args.out) / "config.json").read_text())["report"], indent=1))
    picture = draw_latents(vae, args.out)
    print(f"saved {args.out}" + (f", picture {picture}" if picture else ""))


def read_json(path):
    """The contents of a JSON file; ValueError with its name if it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder, or choose another --out") from None


def reason(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_same(what, before, now, otherwise):
    """ValueError naming the first setting of `now` that is not as `before`: what is there was made differently."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(f"{what} with another {', '.join(changed)} (was {before.get(changed[0])!r}, now "
                         f"{now.get(changed[0])!r}): choose another --out, or {otherwise}")


def add_flags(parser, title, **flags):
    """A labelled group of flags, name=(default, help): the help ends in the default unless it names it itself.

    The default gives the type: False makes a switch, a list takes several values, a type in place of a value has no default.
    A third entry is the least value allowed (a number), the choices (a tuple), or how help shows the value (text).
    """
    add = parser.add_argument_group(title).add_argument
    for name, (default, text, *more) in flags.items():
        flag = "--" + name.replace("_", "-")
        text += "" if "(default" in text else " (default: off)" if default is False else " (default: %(default)s)"
        if default is False:
            add(flag, action="store_true", help=text)
            continue
        example = default[0] if isinstance(default, list) else default          # a value, or the type of one
        kind = example if isinstance(example, type) else type(example)
        options = {{tuple: "choices", str: "metavar"}.get(type(entry), "limit"): entry for entry in more}
        add(flag, type=at_least(options.pop("limit", -math.inf), kind), default=None if kind is example else default,
            nargs="+" if isinstance(default, list) else None, help=text, **options)


def at_least(limit, kind):
    """An argparse type: text as it is, or a number that is finite and not below the limit."""
    def read(text):
        value = kind(text)
        if kind is not str and not limit <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {limit}{' and finite' * (kind is float)}, not {text}")
        return value
    read.__name__ = kind.__name__                           # argparse names it, as in "invalid float value"
    return read


def as_flags(**flags):
    """The words of a command line: as_flags(top_p=1, seed=[0, 1], resume=True) -> ["--top-p", "1", "--seed", "0", "1",
    "--resume"]. What is False or None is left out."""
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def run_main(main_function, script):
    """Run a script's main: bad input ends in one sentence and status 1, Ctrl-C in status 130; no traceback for either."""
    try:
        main_function()
    except (ValueError, OSError, SafetensorError, subprocess.CalledProcessError) as error:   # SafetensorError: a full disk
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"\n{script}: stopped by Ctrl-C; what was saved stays valid", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_main(main, "vae.py")
