# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "hf-lgp[examples]",
# ]
#
# [tool.uv.sources]
# hf-lgp = { path = "..", editable = true }
# ///
"""Train or fine-tune a text classifier with predicted gradients.

Without a data set on the command line this trains a small Bert from scratch to tell which library a paragraph of documentation
comes from, on the docstrings of the libraries installed beside it: no network, no download.

    python examples/train_text.py --output_dir outputs/docstrings --num_train_epochs 6 --logging_steps 50

Fine-tuning on files with a column of texts and one of labels:

    python examples/train_text.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.csv --validation_file test.csv --output_dir outputs/reviews

A data set of the Hub: ``--dataset_name stanfordnlp/imdb``. ``--trainer exact`` trains the same way with plain
``transformers.Trainer``. All of ``TrainingArguments`` and the ``lgp_*`` settings are flags as well; without ``--do_train`` and
``--do_eval`` the script does both.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from shared import InputError, accuracy, class_ids, class_names, find_column, parse, resume_point, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)

from hf_lgp import LGPTrainer

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")

LIBRARIES = ("numpy", "sklearn", "torch", "transformers")
"""Libraries whose docstrings are the data where none are named: all are installed with this script."""

SPLIT_SEED = 0
"""Which rows are held out must not change with ``--seed``, or accuracies of two seeds could not be compared."""

_FILES = 300
"""Files of a library that are read, spread evenly over it: parsing all of them takes a minute."""

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# -- arguments ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model to train, and with which trainer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to fine-tune: a folder or a name on the Hub. Default: a Bert from scratch."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    trainer: Literal["lgp", "exact"] = field(
        default="lgp", metadata={"help": "lgp: LGPTrainer, with predicted gradients. exact: transformers.Trainer."}
    )
    vocabulary: int = field(default=4000, metadata={"help": "From scratch: number of word pieces."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width."})
    num_hidden_layers: int = field(default=2, metadata={"help": "From scratch: number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: attention heads per layer."})
    hidden_dropout_prob: float = field(default=0.1, metadata={"help": "From scratch: dropout."})


@dataclass
class DataArguments:
    """Which texts to train on; none named: docstrings of installed libraries."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or parquet file of texts and labels."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, held out; goes with --train_file."})
    text_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the texts. Default: {' or '.join(TEXT_COLUMNS)}."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: {' or '.join(LABEL_COLUMNS)}."}
    )
    train_val_split: float = field(
        default=0.2, metadata={"help": "Share of the training data that is held out where no held-out data are given."}
    )
    max_length: int = field(default=64, metadata={"help": "Tokens of a text that are read."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many texts."})

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise InputError("--dataset_name and --train_file name the data twice: keep one of them.")
        if self.validation_file and not self.train_file:
            raise InputError("--validation_file needs --train_file: it has the classes.")
        if not 0.0 < self.train_val_split < 1.0:
            raise InputError(f"--train_val_split must lie between 0 and 1, got {self.train_val_split}.")


# -- texts -------------------------------------------------------------------------------------------------------------


def docstrings(libraries: Sequence[str] = LIBRARIES, each: int = 2500) -> Dataset:
    """Paragraphs of prose from the docstrings of installed libraries, in columns ``text`` and ``label``.

    The library's own name is masked, or the task would be to find it.

    Args:
        libraries: Names of installed packages.
        each: Largest number of paragraphs of each, spread evenly over its files.
    """
    texts, labels = [], []
    for label, name in enumerate(libraries):
        found = list(dict.fromkeys(paragraph.replace(name, "[UNK]") for paragraph in _paragraphs(name)))
        chosen = np.unique(np.linspace(0, len(found) - 1, min(each, len(found))).astype(int)) if found else []
        texts += [found[index] for index in chosen]
        labels += [label] * len(chosen)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(libraries))})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def _paragraphs(library: str) -> list[str]:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{library} is not installed: name a data set by --train_file or --dataset_name.")
    paragraphs = []
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    for path in files[:: -(-len(files) // _FILES)]:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and files for other versions of Python
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                paragraphs += [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in paragraphs if 60 <= len(part) <= 600 and ">>>" not in part]


def load_rows(arguments: DataArguments, cache_dir: str | None = None) -> tuple[Dataset, Dataset | None]:
    """Load the training rows and, if the source has them, the held-out rows.

    Raises:
        InputError: If files are missing or cannot be read.
    """
    if not (arguments.dataset_name or arguments.train_file):
        return docstrings(), None
    files = {}
    for split, file in (("train", arguments.train_file), ("validation", arguments.validation_file)):
        if file:
            if not Path(file).is_file():
                raise InputError(f"--{split}_file {file}: there is no such file.")
            files[split] = file
    kind = Path(arguments.train_file or "").suffix.lstrip(".").replace("jsonl", "json")
    try:
        splits = load_dataset(
            arguments.dataset_name or kind, arguments.dataset_config_name, data_files=files or None, cache_dir=cache_dir
        )
    except Exception as error:  # builders raise errors of a dozen kinds; all of them are about the data
        raise InputError(f"Cannot load {arguments.dataset_name or arguments.train_file}: {error}") from error
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    return splits["train"], splits[held_out] if held_out else None


def load_texts(arguments: DataArguments, cache_dir: str | None = None) -> tuple[Dataset, Dataset, list[str]]:
    """Load training texts, held-out texts and class names; the rows have columns ``text`` and ``labels``.

    Raises:
        InputError: If anything about the data has to be changed.
    """
    train, held_out = load_rows(arguments, cache_dir)
    label = find_column(train, arguments.label_column_name, LABEL_COLUMNS, "--label_column_name")
    names = class_names(train, label)

    def prepared(rows: Dataset, where: str) -> Dataset:
        text = find_column(rows, arguments.text_column_name, TEXT_COLUMNS, "--text_column_name")
        if rows.features[text] not in (Value("string"), Value("large_string")):
            raise InputError(
                f"Column `{text}` holds {rows.features[text]}, not texts. Name another by --text_column_name."
            )
        labels = class_ids(rows, label, names, where)
        return Dataset.from_dict({"text": [value or "" for value in rows[:][text]], "labels": labels})

    train = prepared(train, "training")
    if held_out is None:
        parts = train.train_test_split(arguments.train_val_split, seed=SPLIT_SEED)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = prepared(held_out, "held-out")
    return (_at_most(train, arguments.max_train_samples), _at_most(held_out, arguments.max_eval_samples), names)


def _at_most(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=SPLIT_SEED).select(range(count))


# -- model -------------------------------------------------------------------------------------------------------------


def trained_tokenizer(texts: Sequence[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-piece tokenizer as Bert's, learnt from the training texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def build_model(
    arguments: ModelArguments, names: Sequence[str], texts: Sequence[str], max_length: int
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer: a checkpoint's, or a small Bert with a vocabulary of its own.

    Raises:
        InputError: If the checkpoint cannot be loaded or has no padding token.
    """
    labels = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if arguments.model_name_or_path is None:
        tokenizer = trained_tokenizer(texts, arguments.vocabulary, max_length)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            intermediate_size=4 * arguments.hidden_size,
            max_position_embeddings=max(64, max_length),
            hidden_dropout_prob=arguments.hidden_dropout_prob,
            attention_probs_dropout_prob=arguments.hidden_dropout_prob,
            pad_token_id=tokenizer.pad_token_id,
            **labels,
        )
        return BertForSequenceClassification(config), tokenizer
    source = {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, **source)
        config = AutoConfig.from_pretrained(arguments.model_name_or_path, **source, **labels)
        model = AutoModelForSequenceClassification.from_pretrained(
            arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True, **source
        )
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load {arguments.model_name_or_path}: {error}") from error
    if tokenizer.pad_token is None:
        raise InputError(f"The tokenizer of {arguments.model_name_or_path} has no padding token: choose an encoder.")
    return model, tokenizer


# -- the run -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save as the command line says.

    Args:
        arguments: The command line without the program's name; default: that of this process.

    Returns:
        All metrics, ``train_*`` and ``eval_*``.

    Raises:
        InputError: If something in the command or the data has to be changed.
    """
    model_args, data_args, training_args = parse((ModelArguments, DataArguments), arguments)
    checkpoint = resume_point(training_args) if training_args.do_train else None
    logging.basicConfig(format="%(levelname)s: %(message)s", level=training_args.get_process_log_level())
    set_seed(training_args.seed)

    train, held_out, names = load_texts(data_args, model_args.cache_dir)
    logger.info(f"{len(train)} texts to train on, {len(held_out)} held out, {len(names)} classes.")
    model, tokenizer = build_model(model_args, names, train[:]["text"], data_args.max_length)

    def tokens(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=data_args.max_length))

    train, held_out = (rows.map(tokens, batched=True, remove_columns="text") for rows in (train, held_out))
    trainer = (LGPTrainer if model_args.trainer == "lgp" else Trainer)(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy(model_args.cache_dir),
        processing_class=tokenizer,
    )

    return run(trainer, checkpoint, "text-classification", f"{len(held_out)} texts", model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
