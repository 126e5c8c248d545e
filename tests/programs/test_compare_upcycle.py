"""Experts that start as copies of a dense model's MLP, and the specialization loss's gradient on them."""

import pytest
import torch

NUM_EXPERTS = 8
# Experts of the dense MLP's shape, as in the experiment.
SHAPE = dict(hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)
DENSE = dict(SHAPE, num_moe_experts=None, moe_ffn_hidden_size=None)
EXPERTS = dict(SHAPE, num_moe_experts=NUM_EXPERTS, moe_ffn_hidden_size=128)


@pytest.fixture
def upcycle(megatron):
    from examples.compare import upcycle

    return upcycle


@pytest.fixture
def dense(mm, tmp_path):
    """A dense model, and the file of its weights."""
    model = mm.build_model(seed=5, **DENSE)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return model, tmp_path / "weights.pt"


def upcycled(mm, upcycle, file, noise, seed=1, **settings):
    model = mm.build_model(**EXPERTS, **settings)
    upcycle.start(model, file, noise, seed)
    return model


def experts_beside_dense(model, dense):
    """(weight of all experts [E, ...], dense weight) of each linear map of each layer."""
    for layer, dense_layer in zip(model.decoder.layers, dense.decoder.layers):
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in layer.mlp.experts.local_experts]
            assert len(weights) == NUM_EXPERTS
            yield torch.stack(weights).detach(), getattr(dense_layer.mlp, name).weight.detach()


@torch.no_grad()
def logits(mm, model):
    tokens = mm.micro_batches(1)[0]["tokens"]
    return model(tokens, torch.arange(mm.SEQUENCE).expand_as(tokens), None)


def test_a_model_of_copies_computes_what_the_dense_one_does(mm, upcycle, dense):
    model = mm.build_model(**EXPERTS)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert not torch.allclose(logits(mm, model), logits(mm, dense[0]), atol=0.1)
    upcycle.start(model, dense[1], noise=0.0, seed=1)
    torch.testing.assert_close(logits(mm, model), logits(mm, dense[0]), rtol=1e-4, atol=1e-5)
    for experts, weight in experts_beside_dense(model, dense[0]):
        assert torch.equal(experts, weight.expand_as(experts))
    ours, state = dict(model.named_parameters()), dense[0].state_dict()
    routers = {name for name in ours if ".router." in name}
    assert len(routers) == 3 and all(torch.equal(ours[name], before[name]) for name in routers)
    others = {name for name in ours if ".experts." not in name} - routers
    assert "embedding.word_embeddings.weight" in others and all(torch.equal(ours[name], state[name]) for name in others)
    # Nothing of the dense model is left over.
    assert {name for name in state if state[name] is not None and ".mlp." not in name} == others


@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_noise_is_in_standard_deviations_of_the_weight_and_another_in_each_expert(mm, upcycle, dense, noise):
    for experts, weight in experts_beside_dense(upcycled(mm, upcycle, dense[1], noise), dense[0]):
        difference = (experts - weight) / weight.std()
        each = difference.flatten(1)
        assert each.std(dim=1).tolist() == pytest.approx([noise] * NUM_EXPERTS, rel=0.03)
        assert each.mean().abs() < 0.02 * noise
        correlation = torch.corrcoef(each) - torch.eye(NUM_EXPERTS)
        assert correlation.abs().max() < 0.06


def test_noise_is_that_of_its_seed(mm, upcycle, dense):
    def weights(seed):
        model = upcycled(mm, upcycle, dense[1], 0.1, seed)
        return dict(model.named_parameters())

    one, same, other = (weights(seed) for seed in (1, 1, 2))
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) == (".experts." not in name), name


def test_random_numbers_of_training_are_left_alone(mm, upcycle, dense):
    model = mm.build_model(**EXPERTS)
    state = torch.get_rng_state()
    upcycle.start(model, dense[1], noise=0.1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_weights_than_fp32_are_refused(mm, upcycle, dense):
    with pytest.raises(AssertionError, match="optimizers keep a copy"):
        upcycled(mm, upcycle, dense[1], 0.0, bf16=True, params_dtype=torch.bfloat16, moe_router_dtype=None)


def fc1_gradient(mm, model):
    """Length of the specialization loss's gradient with respect to the weights of all experts' linear_fc1."""
    from megatron_moe_spec import SpecConfig, attach

    attach(model, SpecConfig(specialization_loss_coeff=1.0))
    gradients = mm.train_step(model, mm.micro_batches(4))  # without a main loss
    found = [gradient for name, gradient in gradients.items() if "experts" in name and "linear_fc1" in name]
    assert len(found) == 3 * NUM_EXPERTS
    return float(torch.cat([gradient.flatten() for gradient in found]).norm())


def test_copies_get_a_gradient_that_grows_with_their_noise(mm, upcycle, dense):
    """Relative to experts of weights of their own, whose activations are nearly orthogonal; so 10 % may give more."""
    independent = mm.build_model(**EXPERTS)
    own = {name: weight.detach().clone() for name, weight in independent.named_parameters() if ".experts." in name}
    upcycle.start(independent, dense[1], noise=0.0, seed=1)
    independent.load_state_dict(own, strict=False)
    length = fc1_gradient(mm, independent)
    noises = (0, 1e-3, 1e-2, 1e-1)
    ratios = [fc1_gradient(mm, upcycled(mm, upcycle, dense[1], noise)) / length for noise in noises]
    print("gradient over that of independent experts:", *(f"{n:g}: {r:.2g}" for n, r in zip(noises, ratios)))
    assert ratios[0] < 1e-3  # rounding
    assert 0.01 < ratios[1] < 0.05
    assert ratios[2] == pytest.approx(10 * ratios[1], rel=0.05)  # in proportion, while the noise is small
    assert ratios[3] == pytest.approx(100 * ratios[1], rel=0.2)
