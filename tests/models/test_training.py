"""The model with gradients: against transformers, packed against alone, and the ways of saving memory."""

from __future__ import annotations

import pytest
import torch
import transformers

from s1engine.models import CausalLM, load_model
from s1engine.models.batch import SampleBatch
from s1engine.models.weights import checkpoint_places

LENGTHS = [9, 1, 30, 17]


def trainable(folder) -> CausalLM:
    return load_model(str(folder), packed=False).requires_grad_(True).train()


def sample_ids(lengths, vocab=1000):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (length,), generator=generator) for length in lengths]


def batch_of(samples):
    starts = [0]
    for ids in samples:
        starts.append(starts[-1] + len(ids))
    positions = torch.cat([torch.arange(len(ids)) for ids in samples])
    return SampleBatch(positions, torch.tensor(starts, dtype=torch.int32), starts)


def loss_of(model, samples):
    """Sum of the cross-entropies of all tokens but each sample's first."""
    targets = torch.cat([torch.cat((ids[1:], ids[:1])) for ids in samples])
    weights = torch.cat([torch.cat((torch.ones(len(ids) - 1), torch.zeros(1))) for ids in samples])
    return model.lm_head(model(torch.cat(samples), batch_of(samples), None), targets, weights)


def gradients(model):
    """By the checkpoint's names."""
    return {
        name: place.parameter.grad[place.start : place.start + place.rows].clone()
        for name, place in checkpoint_places(model)
    }


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_transformers(make_model, arch, tied):
    folder = make_model(arch, tie_word_embeddings=tied)
    samples = sample_ids(LENGTHS)
    ours = trainable(folder)
    loss = loss_of(ours, samples)
    loss.backward()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = torch.zeros(())
    for ids in samples:
        logits = theirs(ids[None]).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    found = gradients(ours)
    assert set(found) == set(grads)
    for name, grad in found.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-5 * float(grads[name].abs().max()), msg=name)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_packed_samples_are_as_if_alone(make_model, arch):
    samples = sample_ids(LENGTHS)
    packed, alone = trainable(make_model(arch)), trainable(make_model(arch))
    loss_of(packed, samples).backward()
    total = 0.0
    for ids in samples:
        loss = loss_of(alone, [ids])
        loss.backward()
        total += float(loss.detach())
    assert float(loss_of(packed, samples).detach()) == pytest.approx(total, rel=1e-6)
    for name, grad in gradients(packed).items():
        other = gradients(alone)[name]
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)


def test_no_sample_sees_another(make_model):
    model = trainable(make_model("qwen2"))
    first, second, other = sample_ids([12, 8, 12])
    with torch.no_grad():
        one = model(torch.cat((first, second)), batch_of([first, second]), None)[12:]
        two = model(torch.cat((other, second)), batch_of([other, second]), None)[12:]
    assert torch.equal(one, two)


@pytest.mark.parametrize("offloading", [False, True])
def test_checkpointing_changes_no_bit(make_model, offloading):
    samples = sample_ids(LENGTHS)
    plain, saving = trainable(make_model("qwen2")), trainable(make_model("qwen2"))
    saving.checkpointing, saving.offloading = True, offloading
    losses = []
    for model in (plain, saving):
        loss = loss_of(model, samples)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for name, grad in gradients(saving).items():
        assert torch.equal(grad, gradients(plain)[name]), name


def kept_bytes(model, samples):
    """Of the distinct tensors, parameters apart, that the forward pass keeps for the backward pass."""
    storages = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.cat(samples), batch_of(samples), None)
    assert hidden.requires_grad
    return sum(storages.values())


def test_checkpointing_keeps_one_tensor_a_layer(make_model):
    samples = sample_ids([100, 60])
    kept = []
    for layers in (2, 4):
        model = trainable(make_model("qwen2", num_hidden_layers=layers))
        model.checkpointing = True
        kept.append(kept_bytes(model, samples))
    assert kept[1] - kept[0] == 2 * 160 * 96 * 4


def test_training_and_decoding_are_the_same_model(make_model):
    """The engine's log-probabilities of given tokens, on the C++ operators, and the trainer's."""
    from s1engine.llm import LLM

    folder = make_model("qwen3")
    (ids,) = sample_ids([40])
    (scores,) = LLM(str(folder)).score([ids[:1].tolist()], [ids[1:].tolist()])
    loss = loss_of(trainable(folder), [ids])
    assert float(loss.detach()) == pytest.approx(-sum(scores), rel=1e-5)
