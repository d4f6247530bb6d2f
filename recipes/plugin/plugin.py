"""Tell malignant from benign tumours by 30 measurements: a task of one's own in five names."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):  # the fields of `task` in the recipe, with types and defaults
    width: int = 32


def load_data(options, data):
    inputs, targets = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).float()
    splits = [
        {"inputs": inputs[part], "targets": targets[part]}
        for part in (slice(100, None), slice(100))
    ]
    return TensorDataset(*splits, source="scikit-learn's breast cancer data", info=2)


def build_model(options, info):  # `info` is the data set's: here the number of classes
    return nn.Sequential(nn.Linear(30, options.width), nn.ReLU(), nn.Linear(options.width, info))


def loss(options, model, batch):  # the fp32 sum of the losses, and how many they are
    logits = model(batch["inputs"]).float()
    return cross_entropy(logits, batch["targets"], reduction="sum"), batch.weight


def evaluate(options, model, batches):  # the mean loss, and what else is of interest
    total = correct = weight = 0
    for batch in batches:
        logits = model(batch["inputs"]).float()
        total += cross_entropy(logits, batch["targets"], reduction="sum").item()
        correct += (logits.argmax(1) == batch["targets"]).sum().item()
        weight += batch.weight
    return {"loss": total / weight, "accuracy": correct / weight}
