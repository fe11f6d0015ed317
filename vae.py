"""The latent space of reasoning strategies: a VAE over mean-pooled token embeddings (Sec. 3.2).

A trace (a question with a worked answer) becomes one vector h, the mean of its raw token embeddings
(Eq. 5). A small VAE squeezes h through a latent z of a few numbers (Eq. 6-8). Afterwards any
z ~ N(0, I) decodes to a vector that reads like one pseudo-token in the style of some trace, and a
Gaussian fitted to the latents of one domain draws that domain's style.

Departs from the paper (which leaves these open): latent width k = 8; h is centred and divided by
one scalar, its overall standard deviation, so that the loss means the same for every model;
beta = 1; one hidden layer of 128. Beside the VAE we fit a plain Gaussian to h, the control that
tells what the VAE itself adds.

For a vision-language model (Sec. 4.1) q holds the image's visual tokens too, and the decoder is a
small causal transformer: z, seen as 8 parts, becomes 8 prefix rows at once (`--decoder gpt`). How
it is trained is our choice: as the decoder of the same VAE, row l reconstructing the mean of the
l-th eighth of a trace (pool_parts says why not the whole of it).

Run it (writes vae.safetensors, config.json, metrics.jsonl, latents.safetensors and latents.png
into --out):
    python vae.py                               # the embedded world (its base model is made first)
    python vae.py --model Qwen/Qwen3-0.6B-Base --out runs/qwen/vae \\
        --traces math=hub:meta-math/MetaMathQA code=traces_code.jsonl qa=traces_qa.jsonl
    python vae.py --model Qwen/Qwen2.5-VL-3B-Instruct --out runs/vl/vae --traces box=boxes.jsonl
"""

import argparse
import base64
import dataclasses
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

# ---- settings -----------------------------------------------------------------------------------


@dataclass
class VAEConfig:
    """What a VAE is made from, and how. fill_in replaces each None that depends on the model."""

    # data
    model: str | None = HfArg(default=None, help="hub name, folder or world (default: embedded)")
    traces: list[str] | None = HfArg(
        default=None,
        help="[DOMAIN=]JSONL file or [DOMAIN=]hub:DATASET[:CONFIG[:SPLIT]] (default: the world's)",
    )
    limit: int | None = HfArg(default=None, help="traces kept per source (default: 2000, or all)")
    out: str | None = HfArg(default=None, help="folder (default: the world's)", compare=False)
    overwrite: bool = HfArg(default=False, help="replace a VAE of other settings", compare=False)

    # model
    decoder: Literal["mlp", "gpt"] | None = HfArg(
        default=None,
        help="mlp: 1 prefix row a z (Eq. 7), gpt: 8 (Sec. 4.1) (default: gpt if it reads images)",
    )
    latent: int | None = HfArg(default=None, help="width k (default: mlp 8, gpt 1024 or at most d)")
    hidden: int = HfArg(default=128, help="width of the hidden layers")
    beta: float = HfArg(default=1.0, help="weight of the KL term (Eq. 8)")

    # training
    epochs: int | None = HfArg(
        default=None, help="passes over the traces (default: mlp 60, gpt 30)"
    )
    batch: int = HfArg(default=128, help="traces per update")
    lr: float = HfArg(default=2e-3, help="Adam's learning rate")
    seed: int = HfArg(default=0, help="seed of weights, batches and noise")

    def __post_init__(self):
        require_at_least(self, limit=1, latent=1, hidden=1, beta=0, epochs=1, batch=1, lr=0)
        require_choices(self)
        if self.decoder == "gpt" and self.latent is not None:
            GPTDecoder.check(self.latent, self.hidden)


def fill_in(config, model_config):
    """The VAEConfig with defaults for this Hugging Face model_config where it had None."""
    images = reads_images(model_config)
    decoder = config.decoder or ("gpt" if images else "mlp")
    if decoder == "gpt":
        latent = min(1024, model_config.get_text_config().hidden_size)  # the paper's 8 x 128
        epochs = 30
    else:
        latent = 8
        epochs = 60
    latent = config.latent or latent
    epochs = config.epochs or epochs
    limit = config.limit or 2000
    return dataclasses.replace(config, decoder=decoder, latent=latent, epochs=epochs, limit=limit)


# ---- traces -------------------------------------------------------------------------------------


def load_traces(specs, limit=2000):
    """Worked answers by domain, as a list of {question, answer, domain[, image]}.

    specs: each "DOMAIN=SOURCE", or a bare SOURCE whose rows name their domain. SOURCE is a JSONL
    file or "hub:DATASET[:CONFIG[:SPLIT]]" (streamed). limit: traces kept per source.
    Raises ValueError naming the file and line of a malformed row, or the source without traces.
    """
    traces = []
    for spec in specs:
        domain, source = _split_spec(spec)
        read = _hub_traces if source.startswith("hub:") else _jsonl_traces
        traces_of_source = list(itertools.islice(read(source, domain), limit))
        if not traces_of_source:
            raise ValueError(f"{source}: no traces in it; every source needs some")
        traces += traces_of_source
    return traces


def check_traces(specs, limit, skip=()):
    """Read the local sources, for what load_traces would raise: before a base model is made.

    skip: paths that are about to be made (a world's traces). The hub is left to load_traces too.
    """
    for spec in specs or ():
        _, source = _split_spec(spec)
        if source not in skip and not source.startswith("hub:"):
            load_traces([spec], limit)


def _split_spec(spec):
    """Domain and source of "DOMAIN=SOURCE"; of a bare source the domain is None."""
    domain, equals, source = spec.partition("=")
    if not equals:
        return None, spec
    return domain, source


def _jsonl_traces(path, domain):
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path} (of JSONL rows {{question, answer, domain}})")
    # lines of bytes end at "\n" alone; str.splitlines would cut at U+2028 too
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            trace = _trace_of_row(row, domain, f"{path}, line {number}")

            # the path of an image is relative to its file
            image = trace.get("image")
            if isinstance(image, str) and not image.startswith("data:"):
                trace["image"] = str(Path(path).parent / image)
            yield trace


def _hub_traces(source, domain):
    """Rows of a hub set are not ours to mend: those without question or answer are left out."""
    from datasets import load_dataset  # late: a local run needs neither the package nor a network

    name, _, rest = source.removeprefix("hub:").partition(":")
    subset, _, split = rest.partition(":")
    stream = load_dataset(name, subset or None, split=split or "train", streaming=True)
    for number, row in enumerate(stream):
        try:
            yield _trace_of_row(row, domain, f"{source}, row {number}")
        except ValueError:
            if number == 0:  # the very first: the set has other fields than we know
                raise


def _trace_of_row(row, domain, where):
    """Bring one raw row to {question, answer, domain[, image]}; hub sets name these variously."""
    if not isinstance(row, dict):
        row = {}
    if isinstance(row.get("conversations"), list):
        row = _first_exchange(row["conversations"])

    question = _text_of(row, "question", "query", "problem", "prompt", "instruction")
    answer = _text_of(row, "answer", "response", "solution", "output", "content")
    domain = domain or _text_of(row, "domain")
    for name, value in (("answer", answer), ("domain", domain)):
        if value is None:
            form = "{question, answer, domain} (or give the domain as DOMAIN=FILE)"
            raise ValueError(f"{where}: no '{name}' with text in it; a trace is {form}")

    # CodeParrot rows are answers alone
    trace = {"question": question or "", "answer": answer, "domain": domain}
    if row.get("image") is not None:
        trace["image"] = row["image"]
    return trace


def _first_exchange(turns):
    """The first human turn of a ShareGPT conversation that is answered, as a row."""
    for turn, reply in zip(turns, turns[1:]):
        if turn.get("from") == "human" and reply.get("from") == "gpt":
            return {"question": turn.get("value"), "answer": reply.get("value")}
    return {}


def _text_of(row, *names):
    """The first of these fields that holds text, or None."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return None


# ---- the model whose embeddings are pooled ------------------------------------------------------


@dataclass
class Reader:
    """What turns text and pictures into a model's input."""

    tokenizer: object  # of Hugging Face
    image_processor: object = None  # a Qwen2VLImageProcessorPil, or None: the model reads text only

    def read_image(self, source):
        """The Pixels of an image (see open_image): resized to whole patches, normalised, cut."""
        if self.image_processor is None:
            raise ValueError("there is an image, but this model reads text only: use a Qwen2.5-VL")
        image = open_image(source)
        width, height = image.size
        if max(image.size) > 200 * min(image.size):
            size = f"{width} x {height} pixels"
            raise ValueError(f"an image of {size} is over 200 times as long as wide: crop it")
        features = self.image_processor(images=image, return_tensors="pt")
        grid = tuple(features["image_grid_thw"][0].tolist())
        return Pixels(features["pixel_values"], grid)

    def save(self, folder):
        """Write the files of tokenizer and image processor that load_reader reads."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)


@dataclass(frozen=True, eq=False)  # eq=False: the same image is the same object
class Pixels:
    """What a vision tower reads of one image."""

    patches: torch.Tensor  # [rows * columns, 3 * temporal_patch_size * patch_size ** 2], fp32
    grid: tuple  # (1, rows, columns) of patches


def reads_images(model_config):
    """Whether a Hugging Face configuration is that of a vision-language model."""
    return getattr(model_config, "vision_config", None) is not None


def load_config(name):
    """The Hugging Face configuration of a model (see load_model)."""
    from transformers import AutoConfig

    with _loading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_reader(name):
    """The Reader of a model (see load_model)."""
    # the Pillow one needs no torchvision; AutoImageProcessor of transformers 5.17 would ask for it
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    with_images = reads_images(load_config(name))
    with _loading(name):
        reader = Reader(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
        if with_images:
            settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(name)
            kind = str(settings.get("image_processor_type"))
            if not kind.startswith("Qwen2VLImageProcessor"):
                raise ValueError(f"its {kind} is not that of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
            reader.image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    return reader


def load_model(name, dtype=torch.float32):
    """The Hugging Face model of a name: for text, or for images and text.

    name: a hub name, or a folder written by save_pretrained. Weights come from safetensors alone,
    code that lies beside them is never run, and a model that lacks a tensor, or holds one of
    another shape, is refused (weights tied to others are not missing): ValueError in one sentence.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model_class = AutoModelForCausalLM
    if reads_images(load_config(name)):
        model_class = AutoModelForImageTextToText
    # pickles on the hub are refused, not sent to a converter there
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with _loading(name):
        model, info = model_class.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        misshapen = sorted(info["mismatched_keys"])
        if missing:
            raise ValueError(f"its weights lack {missing[0]} ({len(missing)} missing in all)")
        if misshapen:
            key, shape, shape_in_model = misshapen[0]
            raise ValueError(f"its {key} is {list(shape)}, in the model {list(shape_in_model)}")
    return model


@contextmanager
def _loading(name):
    """What transformers raises for a model that cannot be loaded, as one sentence and no more."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no page-long load report: what matters is raised
    logging.disable_progress_bar()  # loading a shard needs no bar of its own
    try:
        yield
    except Exception as error:  # of which kind depends on what is wrong with which file
        choices = "give a hub name, a folder of safetensors by save_pretrained, or a world"
        message = f"cannot load the model '{name}': {first_line(error)} ({choices})"
        raise ValueError(message) from None
    finally:
        logging.set_verbosity(verbosity)


def see_images(model, images):
    """A list of Pixels -> their visual token embeddings, a list of [n_i, d], all at once."""
    tower = model.model.visual
    patches = torch.cat([image.patches for image in images])  # [sum of patches, channels]
    patches = patches.to(tower.device, tower.dtype)
    grid = torch.tensor([image.grid for image in images], device=tower.device)  # [images, 3]
    return list(model.model.get_image_features(patches, grid).pooler_output)


def open_image(source):
    """An RGB Pillow image from a Pillow image, a path, a data URI, or the bytes of a file.

    Raises ValueError in one sentence for a missing, damaged or huge image (a file of a few KB can
    unpack to gigabytes: beyond Pillow's MAX_IMAGE_PIXELS, about 89 million, it is refused unread).
    """
    from PIL import Image  # late: a text model needs no Pillow

    name = str(source)[:60] if isinstance(source, (str, Path)) else "(in memory)"
    try:
        if isinstance(source, str) and source.startswith("data:"):
            _, _, text = source.partition(",")
            source = base64.b64decode(text, validate=True)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image: {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the image {name} is too large: {error}; make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:  # damaged: Pillow has an error a format
        raise ValueError(f"the image {name} cannot be read ({error})") from None


# ---- h: one vector per trace --------------------------------------------------------------------


@torch.no_grad()
def mean_pool(traces, tokenizer, table):
    """h = mean over the tokens of [question; answer] of E (Eq. 5). Returns [N, d].

    table: E [V, d]. No chat template, no special tokens.
    """
    # embedding_bag means without building the [N, T, d] tensor of all embeddings
    ids = []  # of all traces, one after the other
    starts = []  # where each trace starts
    for trace in traces:
        starts.append(len(ids))
        ids += _ids_of_trace(trace, tokenizer)
    table = table.float().cpu()
    bags = torch.tensor(starts)
    return nn.functional.embedding_bag(torch.tensor(ids), table, bags, mode="mean")  # [N, d]


def pool(traces, reader, model, table, rows_per_z):
    """h of traces, as a VAE of so many prefix rows a z is trained on it: [N, rows * d].

    table: the embedding table E [V, d] of the model.
    """
    if rows_per_z == 1 and reader.image_processor is None:
        return mean_pool(traces, reader.tokenizer, table)
    return pool_parts(traces, reader, model, rows_per_z, table)


def is_held_out(number):
    """Whether neither a VAE nor a warm-up learns from the trace of this number: every tenth.

    The number is the trace's place in what load_traces gives. The Gaussians of the domains, a mean
    and a covariance each, are fitted to all.
    """
    return number % 10 == 9


@torch.no_grad()
def pool_parts(traces, reader, model, rows=8, table=None):
    """h of traces that may hold images, for a decoder of `rows` prefix rows: [N, rows * d].

    A trace is the sequence [visual tokens; question; answer] of embeddings (Sec. 4.1 counts the
    image to q). What the rows stand for is our choice: row l is the mean of the l-th of `rows`
    equal parts of the sequence, so early rows speak of the picture and late ones of the answer.
    The mean of the whole, as in Eq. 5, says next to nothing of the answer there: visual tokens
    are many, and far longer than words. For text and rows = 1 this is mean_pool.
    table: E [V, d], by default the model's.
    """
    if table is None:
        table = model.get_input_embeddings().weight
    pooled = []
    for trace in traces:
        ids = torch.tensor(_ids_of_trace(trace, reader.tokenizer))
        x = table[ids].float().cpu()  # [T, d]
        if trace.get("image") is not None:
            pixels = reader.read_image(trace["image"])
            visual = see_images(model, [pixels])[0]  # [n, d]
            x = torch.cat([visual.float().cpu(), x])  # [n + T, d]

        means = []
        for row in range(rows):
            start = row * len(x) // rows
            end = (row + 1) * len(x) // rows
            part = x[start : max(end, start + 1)]  # one token at least: they may be fewer than rows
            means.append(part.mean(0))
        pooled.append(torch.cat(means))
    return torch.stack(pooled)


def _ids_of_trace(trace, tokenizer):
    text = f"{trace['question']} {trace['answer']}".strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"a trace of domain {trace['domain']!r} has no tokens: {str(trace)[:80]}")
    return ids


# ---- the VAE ------------------------------------------------------------------------------------


class GPTDecoder(nn.Module):
    """The prefix decoder of Sec. 4.1: a small causal transformer, z [..., k] -> [..., rows * d].

    z is seen as `rows` tokens of width k / rows (the paper's 8 x 128). Row l sees the parts of z
    up to l. Two layers, four heads: our choice.
    """

    HEADS = 4

    def __init__(self, width, latent, hidden, rows=8, layers=2):
        super().__init__()
        self.check(latent, hidden, rows)
        self.rows = rows
        self.enter = nn.Linear(latent // rows, hidden)
        self.leave = nn.Linear(hidden, width)
        self.position = nn.Parameter(0.02 * torch.randn(rows, hidden))
        block = nn.TransformerEncoderLayer(
            hidden, self.HEADS, 4 * hidden, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        future = torch.full((rows, rows), -torch.inf).triu(1)
        self.register_buffer("future", future, persistent=False)

    @classmethod
    def check(cls, latent, hidden, rows=8):
        """ValueError unless z can be cut into rows, and the hidden width into heads."""
        if latent % rows or hidden % cls.HEADS:
            raise ValueError(
                f"the GPT decoder needs --latent to be a multiple of {rows} (its rows), --hidden "
                f"one of {cls.HEADS} (its heads), not {latent} and {hidden}"
            )

    def forward(self, z):
        parts = z.reshape(-1, self.rows, z.shape[-1] // self.rows)  # [N, rows, k / rows]
        x = self.enter(parts) + self.position  # [N, rows, hidden]
        x = self.blocks(x, mask=self.future)  # [N, rows, hidden]
        return self.leave(x).reshape(*z.shape[:-1], -1)  # [..., rows * d]


class VAE(nn.Module):
    """Encoder h -> (mu, log sigma^2), decoder z -> h_hat: MLPs of one hidden layer (Eq. 6, 7).

    width: d of the policy's embedding table. latent: k. hidden: our choice, 128. rows_per_z: prefix
    rows that one z makes; where it is not 1, h is `rows_per_z` vectors in a row, [rows * d], and
    the decoder a GPTDecoder (Sec. 4.1). Standardisation lives inside: `encode` takes and `decode`
    gives vectors in the space of token embeddings.
    """

    def __init__(
        self, width, latent=8, hidden=128, domains=(), rows_per_z=1, gauss_rank=0, anchors=0
    ):
        super().__init__()
        self.arguments = {  # for load
            "width": width,
            "latent": latent,
            "hidden": hidden,
            "domains": list(domains),
            "rows_per_z": rows_per_z,
            "gauss_rank": gauss_rank,
            "anchors": anchors,
        }
        self.width = width
        self.latent = latent
        self.domains = list(domains)
        self.rows_per_z = rows_per_z

        h_width = rows_per_z * width
        scale_shape = ()
        self.encoder = _mlp(h_width, hidden, 2 * latent)
        if rows_per_z == 1:
            self.decoder = _mlp(latent, hidden, width)
        else:
            self.decoder = GPTDecoder(width, latent, hidden, rows_per_z)
            scale_shape = (h_width,)

        count = len(self.domains)
        self.register_buffer("mean", torch.zeros(h_width))  # of h
        self.register_buffer("scale", torch.zeros(scale_shape))  # of h: one number, or one a row
        # the Gaussian of every domain in latent space; factor: A with A^T A = covariance, so that
        # epsilon @ A ~ N(0, covariance) for epsilon ~ N(0, I)
        self.register_buffer("domain_mean", torch.zeros(count, latent))
        self.register_buffer("domain_factor", torch.zeros(count, latent, latent))
        # the Gaussian of h itself, a control without any VAE
        self.register_buffer("gauss_factor", torch.zeros(gauss_rank, h_width))
        # a few rows of E, by which a policy is recognised
        self.register_buffer("anchor_rows", torch.zeros(anchors, width))

    def standardise(self, h):
        """h [N, rows * d], centred and in units of its scale."""
        return (h - self.mean) / self.scale

    def encode(self, h):
        """h [N, rows * d] -> mu [N, k], log sigma^2 [N, k]."""
        return self.encoder(self.standardise(h)).chunk(2, dim=-1)

    def decode(self, z):
        """z [..., k] -> h_hat [..., rows * d]: pseudo-token embeddings."""
        return self.decoder(z) * self.scale + self.mean

    def loss(self, h, beta, generator):
        """(reconstruction, KL per dimension [k], total) of Eq. 8, means over the batch h [N, ...].

        In units of the standardised h.
        """
        mu, log_var = self.encode(h)
        sigma = torch.exp(log_var / 2)
        epsilon = torch.randn(mu.shape, generator=generator)
        z = mu + sigma * epsilon
        error = self.decoder(z) - self.standardise(h)
        reconstruction = error.pow(2).sum(-1).mean()
        kl = 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).mean(0)  # [k]
        total = reconstruction + beta * kl.sum()
        return reconstruction, kl, total

    def check_policy(self, table):
        """ValueError unless `table` [V, d] is that of the VAE's model, or fine-tuned from it."""
        width = table.shape[1]
        remedy = "train a VAE for this policy with vae.py --model"
        if width != self.width:
            widths = f"width {self.width}, the policy's embeddings have width {width}"
            raise ValueError(f"this VAE decodes to {widths}: {remedy}")
        rows = spread_rows(table, len(self.anchor_rows))
        drift = (rows - self.anchor_rows).norm() / self.anchor_rows.norm()
        if not drift < 0.5:  # fine-tuning moves E by a few per cent, another table is 1.4 away
            table_of_vae = f"another embedding table (relative distance {drift:.2f})"
            raise ValueError(f"this VAE was trained on {table_of_vae}: {remedy}")

    def save(self, folder, **extra):
        """Write vae.safetensors and, with `extra` in it, config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "vae.safetensors")
        # last, as its presence says that the VAE is complete
        config = {"vae": self.arguments, **extra}
        write_text(folder / "config.json", json.dumps(config, indent=1))

    @classmethod
    def load(cls, folder):
        """A trained VAE from its folder. ValueError in one sentence if it is missing or damaged."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            vae = cls(**config["vae"])
            vae.load_state_dict(load_file(folder / "vae.safetensors"))
        except FileNotFoundError:
            raise ValueError(f"no VAE in {folder}: train one with vae.py --out {folder}") from None
        except Exception as error:  # json, safetensors and torch each have their own kind
            problem = first_line(error)
            raise ValueError(f"the VAE in {folder} cannot be read: {problem}") from None
        return vae.eval().requires_grad_(False)


def _mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def spread_rows(table, count):
    """`count` rows of E [V, d], evenly spread: [count, d] in fp32."""
    index = torch.linspace(0, len(table) - 1, count).long()
    return table[index].float().cpu()


# ---- training -----------------------------------------------------------------------------------


def train(config):
    """The whole stage: use the finished VAE in config.out, or train one.

    config: a VAEConfig whose model is a hub name, a folder or a run folder (main resolves worlds).
    Returns the VAE. Raises ValueError where config.out holds one of other settings.
    """
    if not (config.model and config.traces and config.out):
        raise ValueError("--model, --traces and --out are needed where the model is no world")
    name = config.model
    if (Path(name) / "policy" / "config.json").is_file():
        name = str(Path(name) / "policy")  # a run folder holds its model there
    config = fill_in(config, load_config(name))

    path = Path(config.out) / "config.json"
    if path.is_file() and not config.overwrite:
        before = read_json(path).get("settings", {})
        now = result_settings(config)
        require_same(f"{config.out} holds a VAE trained", before, now, "--overwrite to replace it")
        print(f"using {config.out}", flush=True)
        return VAE.load(config.out)

    traces = load_traces(config.traces, config.limit)
    check_counts(traces)
    vae = train_vae(config, traces, load_reader(name), load_model(name))
    print(json.dumps(read_json(path)["report"], indent=1))
    saved = f"saved {config.out}"
    picture = draw_latents(vae, config.out)
    if picture:
        saved += f", picture {picture}"
    print(saved, flush=True)
    return vae


def check_counts(traces):
    """ValueError for traces too few to train on, in all or of a domain."""
    if len(traces) < 10:
        raise ValueError(f"{len(traces)} traces are too few for a VAE: give at least 10")
    for domain, count in Counter(trace["domain"] for trace in traces).items():
        if count < 2:
            raise ValueError(f"domain '{domain}' has 1 trace: a Gaussian needs at least 2")


def train_vae(config, traces, reader, model):
    """Train on h of all traces but every tenth (held out), fit the Gaussians, save to config.out.

    Learning stays on the CPU: 5,000 vectors through two small MLPs take seconds there. Returns the
    VAE. Files: config.json (shape, settings, report), vae.safetensors, metrics.jsonl (a line an
    epoch), latents.safetensors (mu [N, k] and domain [N] of all traces).
    """
    config = fill_in(config, model.config)
    check_counts(traces)
    domains = sorted({trace["domain"] for trace in traces})
    labels = torch.tensor([domains.index(trace["domain"]) for trace in traces])  # [N]
    table = model.get_input_embeddings().weight.detach()
    rows_per_z = 8 if config.decoder == "gpt" else 1
    h = pool(traces, reader, model, table, rows_per_z)  # [N, rows * d]
    held_out = torch.tensor([is_held_out(number) for number in range(len(h))])  # [N]

    vae = _new_vae(config, h[~held_out], table, domains, rows_per_z)
    metrics = _fit(vae, h[~held_out], h[held_out], config)
    vae.eval().requires_grad_(False)
    fit_domains(vae, h, labels)

    # all is written before any of it replaces what was there
    new = Path(config.out) / "new"
    figures = report(vae, h[held_out], table)
    vae.save(new, report=figures, settings=result_settings(config))
    mu, _ = vae.encode(h)
    save_file({"mu": mu.contiguous(), "domain": labels}, new / "latents.safetensors")
    lines = [json.dumps(line) + "\n" for line in metrics]
    write_text(new / "metrics.jsonl", "".join(lines))
    _move_in(new, Path(config.out))
    return vae


def _move_in(new, out):
    """Move a complete VAE from the folder `new` to `out`; config.json says that it is there."""
    (out / "config.json").unlink(missing_ok=True)
    for name in ("metrics.jsonl", "latents.safetensors", "vae.safetensors", "config.json"):
        os.replace(new / name, out / name)
    new.rmdir()


def _new_vae(config, h, table, domains, rows_per_z):
    """A VAE with fresh weights and the moments of h [N, rows * d]."""
    width = table.shape[1]
    mean = h.mean(0)
    centred = h - mean
    rank = min(256, *centred.shape)
    anchors = min(64, len(table))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = VAE(width, config.latent, config.hidden, domains, rows_per_z, rank, anchors)

    vae.mean.copy_(mean)
    if rows_per_z == 1:
        vae.scale.copy_(centred.pow(2).mean().sqrt())
    else:
        # one scale a row: visual tokens can be 50 times as long as words, and would be all that
        # is reconstructed
        squares = centred.view(-1, rows_per_z, width).pow(2)  # [N, rows, d]
        vae.scale.copy_(squares.mean((0, 2)).sqrt().repeat_interleave(width))

    # the control "gauss": N(mean h, cov h) from the first principal directions
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    factor = singular[:rank, None] * directions[:rank]  # [rank, rows * d]
    vae.gauss_factor.copy_(factor / math.sqrt(max(1, len(centred) - 1)))
    vae.anchor_rows.copy_(spread_rows(table, anchors))
    return vae


def _fit(vae, h, h_held_out, config):
    """Minimise Eq. 8 over h [N, rows * d] by Adam. Returns the metrics, a dict an epoch."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.lr)
    metrics = []
    for epoch in tqdm(range(config.epochs), desc="vae", leave=False):
        order = torch.randperm(len(h), generator=generator)
        for batch in h[order].split(config.batch):
            _, _, loss = vae.loss(batch, config.beta, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # the same noise after every epoch, so that they compare
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            reconstruction, kl, loss = vae.loss(h_held_out, config.beta, noise)
        line = {"epoch": epoch + 1}
        line["held_out_reconstruction"] = reconstruction.item()
        line["held_out_kl"] = kl.sum().item()
        line["held_out_loss"] = loss.item()
        metrics.append(line)
    return metrics


@torch.no_grad()
def fit_domains(vae, h, labels):
    """One Gaussian per domain over its traces' latents (Sec. 3.3). h [N, rows * d], labels [N].

    The moments of z ~ q(z|h): mean of mu; covariance of mu plus the mean of sigma^2, which is what
    sampling z for ever would give.
    """
    mu, log_var = vae.encode(h)
    for i in range(len(vae.domains)):
        mu_of_domain = mu[labels == i]  # [n, k]
        mean_variance = log_var[labels == i].exp().mean(0)  # [k]
        covariance = torch.cov(mu_of_domain.T) + torch.diag(mean_variance)  # [k, k]
        values, vectors = torch.linalg.eigh(covariance)
        deviations = values.clamp_min(0).sqrt()  # low rank is fine
        vae.domain_mean[i] = mu_of_domain.mean(0)
        vae.domain_factor[i] = (vectors * deviations).T


@torch.no_grad()
def report(vae, h, table):
    """The figures that would betray a collapsed posterior, on held-out h [N, rows * d].

    Squared errors are per vector, standardised: a reconstruction no better than predict_the_mean
    says that the latent carries nothing. active_units counts latent dimensions whose mean varies
    with the input: Var(mu) > 0.01 (Burda et al. 2016).
    """
    mu, _ = vae.encode(h)
    variance = mu.var(0, correction=min(1, len(mu) - 1))  # [k], and 0 of a single trace
    reconstruction, kl, _ = vae.loss(h, 1.0, torch.Generator().manual_seed(0))
    squares = vae.standardise(h).pow(2).sum(-1)  # [N]
    kl_per_dimension = [round(value, 3) for value in kl.tolist()]
    if len(kl) > 16:
        kl_per_dimension = round(kl.sum().item(), 3)  # too many to read: their sum

    z = torch.randn(2000, vae.latent, generator=torch.Generator().manual_seed(1))
    return {
        "reconstruction": round(reconstruction.item(), 4),
        "predict_the_mean": round(squares.mean().item(), 4),
        "kl_per_dimension": kl_per_dimension,
        "active_units": int((variance > 0.01).sum()),
        "decoded_prefix_norm": _mean_norm(vae.decode(z), vae.width),
        "h_norm": _mean_norm(h, vae.width),
        "token_embedding_norm": _mean_norm(table.float(), vae.width),
    }


def _mean_norm(vectors, width):
    norms = vectors.reshape(-1, width).norm(dim=-1)
    return round(norms.mean().item(), 4)


# ---- pictures (Fig. 3) --------------------------------------------------------------------------

# colour and marker of each domain, for every eye (Okabe and Ito)
DOMAIN_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def pca(x, components=2):
    """x [N, d] centred and projected on its first principal directions: [N, components]."""
    centred = x - x.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:components].T


def draw_latents(vae, folder, per_domain=100):
    """latents.png: latents and decoded prefixes of every domain, by PCA and by t-SNE.

    per_domain: points of each, the first of its traces. Returns the path, or None where the
    libraries are missing.
    """
    try:  # late: pictures are optional
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
    except ImportError as error:
        print(f'no picture of the latents: {error} (pip install -e ".[plots]")')
        return None

    latents = load_file(Path(folder) / "latents.safetensors")
    index = []
    for i in range(len(vae.domains)):
        of_domain = (latents["domain"] == i).nonzero()[:, 0]
        index.append(of_domain[:per_domain])
    index = torch.cat(index)  # [n]
    mu = latents["mu"][index]  # [n, k]
    labels = latents["domain"][index]  # [n]

    vectors = {"latents": mu, "decoded prefixes": vae.decode(mu)}
    views = {f"PCA of {name}": pca(x) for name, x in vectors.items()}  # {title: points [n, 2]}
    perplexity = min(30, len(mu) // 4)
    if perplexity > 1:  # else there are too few points
        for name, x in vectors.items():
            points = TSNE(perplexity=perplexity, random_state=0).fit_transform(x.numpy())
            views[f"t-SNE of {name}"] = torch.from_numpy(points)

    figure = Figure(figsize=(4 * len(views) + 1, 3.8), layout="constrained")
    axes = figure.subplots(1, len(views))
    for axis, (title, points) in zip(axes, views.items()):
        axis.set(title=title, xticks=[], yticks=[])
        for i, domain in enumerate(vae.domains):
            x, y = points[labels == i].T
            colour, marker = DOMAIN_STYLES[i % len(DOMAIN_STYLES)]
            axis.scatter(x, y, s=12, alpha=0.7, color=colour, marker=marker, label=domain)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    path = Path(folder) / "latents.png"
    figure.savefig(path, dpi=120)
    return path


# ---- what every script shares -------------------------------------------------------------------


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of the description, and ends in the default where there is one."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def parse_settings(cls, doc, argv=None):
    """The command line as an instance of the dataclass `cls`; doc: what --help says first.

    Exits with status 2 and one sentence where a flag is unknown or its value of the wrong type;
    the ValueErrors of cls.__post_init__ pass.
    """
    parser = HfArgumentParser(
        cls, description=doc, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return cls(**vars(known))


def result_settings(config):
    """{name: value} of the fields that change a result (compare=True), as JSON gives them back."""
    settings = {}
    for field in dataclasses.fields(config):
        if field.compare:
            settings[field.name] = getattr(config, field.name)
    return json.loads(json.dumps(settings, default=str))


def require_at_least(config, **limits):
    """ValueError where a field of config is below its limit, nan or infinite; None passes."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if value is None or limit <= value < math.inf:
            continue
        bound = f"at least {limit}"
        if value == math.inf:
            bound += " and finite"
        raise ValueError(f"--{name.replace('_', '-')} must be {bound}, not {value}")


def require_choices(config):
    """ValueError where a Literal field of config has none of its choices; None passes."""
    # the annotations: HfArgumentParser changes the types that dataclasses.fields gives
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        for kind in (hint, *get_args(hint)):  # of "Literal[...] | None" the Literal is an argument
            if get_origin(kind) is Literal and value not in (*get_args(kind), None):
                choices = ", ".join(get_args(kind))
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be one of {choices}, not {value!r}")


def require_same(what, before, now, otherwise):
    """ValueError naming the settings of `now` that are not as `before`: it was made differently."""
    names = {**before, **now}
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        first = changed[0]
        difference = f"{', '.join(changed)} (was {before.get(first)!r}, now {now.get(first)!r})"
        raise ValueError(f"{what} with another {difference}: choose another --out, or {otherwise}")


def read_json(path):
    """The contents of a JSON file; ValueError with its name if it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        remedy = "remove its folder, or choose another --out"
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def write_text(path, text):
    """Replace a file in one step: readers see the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def first_line(error):
    """The first line of what an exception says, or its name where it says nothing."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def run_main(main_function, script):
    """Run a script's main: bad input ends in one sentence and status 1, Ctrl-C in status 130."""
    try:
        main_function()
    except (ValueError, OSError, SafetensorError) as error:  # SafetensorError: a full disk
        sentence = " ".join(str(error).split())
        sys.exit(f"{script}: {sentence}")
    except KeyboardInterrupt:
        print(f"\n{script}: stopped by Ctrl-C; what was saved stays valid", file=sys.stderr)
        sys.exit(130)


# ---- command line -------------------------------------------------------------------------------


def main(argv=None):
    """Train the VAE that the flags describe, or say that it is there."""
    config = parse_settings(VAEConfig, __doc__, argv)
    train(resolve_world(config))


def resolve_world(config):
    """The VAEConfig with the model, traces and folder of a world in place of its name.

    The base model of the world is made where it is missing. Any other model is left as it is.
    """
    # late: worlds are known to rewards.py, and nothing above this line needs one
    from rewards import DEFAULT_WORLD, find_model, world_of, world_root, world_traces

    model = config.model or DEFAULT_WORLD
    if world_of(model) is None:
        return config

    root = world_root(model)
    config = dataclasses.replace(config, model=f"{root}/base", out=config.out or f"{root}/vae")
    if not config.traces:
        limit = config.limit or 10**9
        config = dataclasses.replace(config, traces=world_traces(model), limit=limit)
    check_traces(config.traces, config.limit or 2000, skip=world_traces(model))
    find_model(model)
    return config


if __name__ == "__main__":
    run_main(main, "vae.py")
