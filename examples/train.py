"""Train a small language model with latent attention, byte by byte, and let it write from its cache.

    python examples/train.py                  # on the language reference that ships with Python: 3 minutes
    python examples/train.py TEXT --steps 2000

The layers are ``mla.nn``'s and torch's, the training loop is torch's. ``recompute_kv`` keeps queries and
latents for the backward pass instead of every head's keys, values and scores.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mla import LatentCache, MLAConfig, MultiheadLatentAttention, RopeConfig
from mla.nn import RMSNorm

WINDOW, BATCH, RATE = 256, 8, 3e-3
CONFIG = MLAConfig(
    hidden_size=192,
    num_attention_heads=6,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope=RopeConfig(layout="interleaved", theta=10000.0),
)


class Block(nn.Module):
    """Attention, then an MLP, each on the normed stream and added to it."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        width = CONFIG.hidden_size
        self.attention_norm, self.mlp_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attention = MultiheadLatentAttention(CONFIG, layer_idx=layer_idx, recompute_kv=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: LatentCache | None = None) -> Tensor:
        """[b, s, d] to [b, s, d], appending s latents to the cache."""
        x = x + self.attention(self.attention_norm(x), cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """Logits of the next byte."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, CONFIG.hidden_size)
        self.blocks = nn.ModuleList(Block(index) for index in range(layers))
        self.norm = RMSNorm(CONFIG.hidden_size, 1e-6)
        self.head = nn.Linear(CONFIG.hidden_size, 256, bias=False)

    def forward(self, ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        """Bytes [b, s], which follow those in the cache, to logits [b, s, 256]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cache)
        return self.head(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=450, help=f"of {BATCH} windows of {WINDOW} bytes")
    parser.add_argument("--prompt", default="The ", help="what it writes after")
    arguments = parser.parse_args()
    if arguments.steps < 1 or not arguments.prompt:
        parser.error("--steps takes 1 or more, --prompt a byte or more")
    torch.manual_seed(0)
    model = ByteModel()
    print(f"{sum(x.numel() for x in model.parameters()):,} parameters")
    train(model, read(arguments.text), arguments.steps)
    print(write(model, arguments.prompt, 400))
    row = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim
    whole = CONFIG.num_attention_heads * (CONFIG.qk_head_dim + CONFIG.v_head_dim)
    print(f"Cached for each byte and layer: {row} numbers; whole keys and values would be {whole}.")


def read(path: Path | None) -> Tensor:
    """The bytes of a file, or of Python's language reference, int64 [n]."""
    if path is not None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise SystemExit(f"{path} does not open: {error.strerror}") from error
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    if len(text) < 20 * WINDOW:
        raise SystemExit(f"{path}: expected at least {20 * WINDOW} bytes to learn from, got {len(text)}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model: ByteModel, text: Tensor, steps: int) -> None:
    """Learn all but the last tenth of the text, which tells how well that went."""
    border = len(text) * 9 // 10
    learnt, held_out = text[:border], text[border:]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss(model, windows(learnt)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        rate.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                bits = float(loss(model, windows(held_out))) / math.log(2)
            print(f"step {step}: {bits:.2f} bits per byte held out, {time.monotonic() - started:.0f} s")


def windows(text: Tensor) -> Tensor:
    """Windows from anywhere in the text, [BATCH, WINDOW + 1]."""
    starts = torch.randint(len(text) - WINDOW, (BATCH, 1))
    return text[starts + torch.arange(WINDOW + 1)]


def loss(model: ByteModel, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of every byte after those before it, in nats."""
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def write(model: ByteModel, prompt: str, count: int) -> str:
    """The prompt and ``count`` bytes after it; each is read once, the rest comes from a cache."""
    cache = LatentCache()
    written = list(prompt.encode())
    ids = torch.tensor([written])
    for _ in range(count):
        chances = (model(ids, cache)[0, -1] / 0.8).softmax(-1)
        ids = torch.multinomial(chances, 1)[None]
        written.append(int(ids))
    return bytes(written).decode(errors="replace")


if __name__ == "__main__":
    main()
