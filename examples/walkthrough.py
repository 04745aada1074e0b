# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "hf-lgp[examples,plots]",
# ]
#
# [tool.uv.sources]
# hf-lgp = { path = "..", editable = true }
# ///
"""A walk through hf_lgp in cells, for an editor that runs ``# %%`` cells one by one, or from top to bottom.

Run it by ``python examples/walkthrough.py``.
"""

# ruff: noqa: E402

# %% [markdown]
# ## A model and data
#
# A ViT of some 0.2 M parameters and the handwritten digits that come with scikit-learn, so that nothing is downloaded. Sixteen patches and a class token make
# 17 rows per image. The more rows, the more a prediction spares; these are few, and the probe will say so.

# %%
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

digits = load_digits()
pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
held_out, train = rows[::5], [row for number, row in enumerate(rows) if number % 5]

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    num_labels=10,
    attn_implementation="eager",
)
set_seed(0)
model = ViTForImageClassification(config)

# %% [markdown]
# ## Will it pay?
#
# The probe trains a copy for a few dozen steps and tells what a step with predictions costs, how much of the gradient's variance predictions explain, and what follows.

# %%
from hf_lgp import LGPTrainer, LGPTrainingArguments, probe

folder = tempfile.mkdtemp()
args = LGPTrainingArguments(
    folder,
    num_train_epochs=8,
    per_device_train_batch_size=64,
    learning_rate=2e-3,
    warmup_steps=20,
    logging_steps=23,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
print(probe(model, train, args))

# %% [markdown]
# ## Train
#
# `LGPTrainer` takes what `Trainer` takes. By default it chooses the share of each batch that gets exact gradients, by measured cost and noise; that may be the whole batch.

# %%
trainer = LGPTrainer(model, args, train_dataset=train, eval_dataset=held_out)
trainer.train()
print(trainer.evaluate())

# %% [markdown]
# ## What happened?
#
# Beside every training loss the log says what the method did.

# %%
for entry in trainer.state.log_history:
    if "loss" in entry:
        print({name: value for name, value in entry.items() if name in ("step", "loss") or name.startswith("lgp/")})

# %% [markdown]
# ## A fixed fraction
#
# With a fixed fraction a run is reproducible bit for bit. A quarter of every batch gets exact gradients here, the rest predicted ones, and the expected gradient is the same.

# %%
args.lgp_control_fraction = 0.25
set_seed(0)
fixed = LGPTrainer(ViTForImageClassification(config), args, train_dataset=train, eval_dataset=held_out)
fixed.train()
print(fixed.evaluate())

# %% [markdown]
# ## Card and checkpoint
#
# What is saved is a plain transformers checkpoint; the card has a section on the run.

# %%
fixed.save_model()
fixed.create_model_card()
print(open(f"{folder}/README.md", encoding="utf-8").read())
again = ViTForImageClassification.from_pretrained(folder)
with torch.no_grad():
    right = again(pixels[::5]).logits.argmax(1) == torch.from_numpy(digits.target[::5])
accuracy = right.double().mean().item()
print(f"held-out accuracy {accuracy:.1%}")
