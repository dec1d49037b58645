"""A memory model in a minute: build, train a little, read as a stream, continue. No data needed.

python examples/quickstart.py
"""

import inspect
import statistics

import torch

from pytitans import TitansConfig, TitansForCausalLM

torch.manual_seed(0)
model = TitansForCausalLM(
    TitansConfig(variant="mal", hidden_size=64, num_hidden_layers=2, intermediate_size=128)
)
text = torch.tensor([list(inspect.getsource(statistics).encode())])  # bytes are the tokens
print(f"{model.num_parameters():,} parameters, a text of {text.shape[1]:,} bytes")

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(120):
    start = int(torch.randint(text.shape[1] - 1024, ()))
    piece = text[:, start : start + 1024]
    loss = model(piece, labels=piece).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 40 == 39:
        print(f"step {step + 1}: {loss.item() / 0.6931:.2f} bits per byte")

model.eval()
with torch.no_grad():
    whole = model(text[:, :5000]).logits
    cache, pieces = None, []
    for piece in text[:, :5000].split(700, dim=1):  # any sizes: the cache has constant size
        out = model(piece, cache=cache, use_cache=True)
        cache = out.cache
        pieces.append(out.logits)
    print(f"stream against one call: {(torch.cat(pieces, 1) - whole).abs().max():.1e}")

prompt = torch.tensor([list(b"def median(data):\n")])
new = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
print(repr(bytes(token for token in new.tolist() if token < 256).decode(errors="replace")))
