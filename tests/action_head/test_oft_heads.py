"""Losses, gradients and actions of the released OpenVLA-OFT code, for its three kinds of head."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oft_world import Case, cases, close
from torch import Tensor, nn

from openvla_lightning import ActionTokenizer
from openvla_lightning.action_head import Acting
from openvla_lightning.action_head.diffusion import DiffusionHead, time_embedding
from openvla_lightning.action_head.noise_schedule import NoiseSchedule
from openvla_lightning.model.llm import next_token_loss
from openvla_lightning.model.parallel_decoding import parallel_states
from openvla_lightning.strategy import LoRA

pytestmark = pytest.mark.golden
COLUMNS = slice(31744, 32064)


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def needs(case: Case, *kinds: str) -> None:
    if case.kind not in kinds:
        pytest.skip(f"actions of this variant are {case.kind}")


def loss_of(case: Case, vla: Any, step: int | None = None) -> tuple[Tensor, Tensor]:
    """The released training loss, and what the head put out. `step`: of the training curve, with its own noise."""
    batch = case.batch
    if case.kind == "l1":
        loss, prediction = case.head().loss(vla, batch)
        return loss, prediction.actions
    if case.kind == "diffusion":
        head: Any = case.head()
        names = ("fwd/noise", "fwd/timesteps") if step is None else (f"train/noise_{step}", f"train/timesteps_{step}")
        noise, timesteps = case[names[0]], case[names[1]]
        noisy = head.schedule.noised(batch.actions, noise, timesteps)
        predicted = head.noise(vla, batch, noisy, timesteps)
        return head.denoising_loss(vla, batch, noise, timesteps)[0], predicted
    # the end token is learnt, too
    batch = replace(batch, places=torch.cat([batch.places, batch.places[:, -1:] + 1], dim=1))
    zeros = torch.zeros(len(batch.input_ids), case.places, vla.llm.dim)
    logits = vla.llm.logits(vla.states(batch, slots=zeros, causal=False))
    return next_token_loss(logits, batch.labels[:, 1:].gather(1, batch.places)), logits[:, :-1]


def test_loss_and_output(case: Case) -> None:
    with torch.no_grad():
        loss, out = loss_of(case, case.vla)
    close(loss, case["fwd/loss"], 2e-5)
    if case.kind == "tokens":
        assert torch.equal(out.argmax(-1), case["fwd/argmax"])
        close(out[..., COLUMNS], case["fwd/logits_action_cols"], 1e-3)
        close(out.logsumexp(-1), case["fwd/logsumexp"], 1e-3)
    else:
        close(out, case["fwd/head_out"], 1e-4)


def test_metrics(case: Case) -> None:
    """What the released code logs: absolute errors of the current action and of those to come, apart."""
    if case.kind == "diffusion":
        needs(case, "l1", "tokens")  # the released code logs none from one noise level
    with torch.no_grad():
        _, out = loss_of(case, case.vla)
    batch = case.batch
    if case.kind == "tokens":
        tokenizer = ActionTokenizer()
        target = batch.labels[:, 1:].gather(1, batch.places)
        shape = batch.actions.shape
        out_values = torch.from_numpy(tokenizer.decode(out.argmax(-1).numpy())).reshape(shape)
        target_values = torch.from_numpy(tokenizer.decode(target.numpy())).reshape(shape)
        error = (out_values - target_values).abs()
        right = (out.argmax(-1) == target).reshape(shape).float()
        close(right[:, 0].mean(), case["fwd/metrics/curr_action_accuracy"], 1e-6)
        close(right[:, 1:].mean(), case["fwd/metrics/next_actions_accuracy"], 1e-6)
    else:
        error = (out - batch.actions).abs()
    close(error[:, 0].mean(), case["fwd/metrics/curr_action_l1_loss"], 2e-5)
    close(error[:, 1:].mean(), case["fwd/metrics/next_actions_l1_loss"], 2e-5)


def our_name(released: str) -> str:
    """A parameter's name in the released training script, as we call it."""
    name = re.sub(r"\.blocks\.(\d+)\.block\.", r".blocks.\1.", released.removeprefix("vla."))
    name = name.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace("base_model.model.", "")
    return name.replace("noisy_action_projector.", "action_head.noisy_action_projector.", 1)


def test_gradients(case: Case) -> None:
    vla = case.load(merge=False).requires_grad_(True)  # FiLM's folders keep the towers' adapters apart
    loss_of(case, vla)[0].backward()
    ours = {name.replace(".base_layer.", "."): parameter for name, parameter in vla.named_parameters()}
    norms = {our_name(n): v for n, v in zip(case.arrays["grad/names"], case.arrays["grad/l2"], strict=True)}
    assert set(norms) == set(ours)
    for name, expected in norms.items():
        gradient = ours[name].grad
        if np.isnan(expected):
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None, name
            assert gradient.double().norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-7), name
    total = torch.stack([p.grad.double().norm() for n, p in ours.items() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(float(case.arrays["grad/total_l2"]), rel=1e-3)
    for name in [n for n in case.arrays if n.startswith("grad/full/")]:
        expected_grad = case[name].double()
        gradient = ours[our_name(name.removeprefix("grad/full/"))].grad
        assert gradient is not None
        assert (gradient.double() - expected_grad).abs().max() <= 1e-3 * expected_grad.abs().max(), name
    rows = vla.llm.model.embed_tokens.weight.grad[case["grad/embed_ids"]]
    expected_rows = case["grad/embed_rows"]
    assert (rows - expected_rows).abs().max() <= 1e-3 * expected_rows.abs().max()
    written = case.batch.input_ids.gather(1, case.batch.places + 1)
    assert not vla.llm.model.embed_tokens.weight.grad[written].any(), "ids at the places learn something"


def adapted(case: Case) -> Any:
    """The model with fresh adapters as the released training step had them; FiLM's vision adapters from the file."""
    vla = case.load(merge=False)
    LoRA(case.meta["lora_rank"], within=["projector", "llm"] if case.meta["film"] else None).apply(vla)
    own = {f"vla.base_model.model.{n}" for n, _ in vla.named_parameters() if "lora_" in n}
    fresh = [str(n) for n in case.arrays["train/fresh_lora_A_names"]]
    parameters = dict(vla.named_parameters())
    with torch.no_grad():
        for index, name in enumerate(fresh):
            parameter = parameters[our_name(name)]
            flat = 0.1 * np.sin(0.37 * np.arange(parameter.numel(), dtype=np.float64) + 0.5 * index)
            parameter.copy_(torch.from_numpy(flat.astype(np.float32)).view_as(parameter))
            parameters[our_name(name).replace("lora_A", "lora_B")].zero_()
    assert own
    for name, parameter in parameters.items():
        learns = "lora_" in name or name.startswith(("action_head.", "proprio_projector."))
        parameter.requires_grad_(learns or re.search(r"blocks\.\d+\.(scale|shift)\.", name) is not None)
    return vla


def test_training_curve(case: Case) -> None:
    vla = adapted(case)
    learning = {name: p for name, p in vla.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in learning.values()) == case["train/trainable_params"]
    optimiser = torch.optim.AdamW(learning.values(), lr=5e-4)
    losses = []
    for step in range(len(case.arrays["train/losses"])):
        loss, _ = loss_of(case, vla, step)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            names, norms = case.arrays["train/step0_grad_names"], case.arrays["train/step0_grad_l2"]
            for name, expected in zip(names, norms, strict=True):
                gradient = learning[our_name(str(name))].grad
                norm = 0.0 if gradient is None else gradient.double().norm().item()
                assert norm == pytest.approx(np.nan_to_num(expected), rel=1e-3, abs=1e-7), name
        optimiser.step()
    # Adam divides tiny gradients by their size: the last losses differ by more in float64 than they do here.
    np.testing.assert_allclose(losses, case.arrays["train/losses"], atol=5e-4, rtol=0)
    np.testing.assert_allclose(losses[:3], case.arrays["train/losses"][:3], atol=1e-4, rtol=0)
    assert losses[0] == pytest.approx(case.arrays["train/losses"][0], abs=2e-5)


def samples(case: Case, start: str = "predict") -> Iterator[int]:
    yield from (int(name.split("/")[1]) for name in case.arrays if re.fullmatch(rf"{start}/\d+/actions", name))


def test_actions(case: Case) -> None:
    """What the released policy answers to one request after the other."""
    for sample in samples(case):
        request = case.request(sample)
        with torch.no_grad():
            if case.kind == "diffusion":
                _denoises(case, request, f"predict/{sample}", len(case.arrays[f"predict/{sample}/timesteps"]))
                continue
            hidden = parallel_states(case.vla, request, case.places)
            close(hidden[0], case[f"predict/{sample}/action_hidden"], 2e-4)
            if case.kind == "l1":
                actions = case.head().decoder(case.vla, Acting(normalise=lambda pixels: pixels))(
                    request, case.meta["action_dim"], None
                )
                close(actions[0], case[f"predict/{sample}/normalized_actions"], 1e-4)
            else:
                ids = case.vla.llm.logits(hidden).argmax(-1)[0]
                assert torch.equal(ids, case[f"predict/{sample}/token_ids"])


def test_actions_in_fewer_steps(case: Case) -> None:
    needs(case, "diffusion")
    for sample in samples(case, "predict_10steps"):
        start = f"predict_10steps/{sample}"
        with torch.no_grad():
            _denoises(case, case.request(sample), start, len(case.arrays[f"{start}/timesteps"]))


def test_denoising_a_padded_batch(case: Case) -> None:
    needs(case, "diffusion")
    with torch.no_grad():
        _denoises(case, case.batch, "val", len(case.arrays["val/timesteps"]))


def _denoises(case: Case, request: Any, start: str, steps: int) -> None:
    """Each step from the stored sample ends at the stored one; on the whole way rounding grows in some numbers.

    Where a clean estimate is not clipped, the first steps divide by 0.001: the released code run twice on two versions
    of torch differs by as much.
    """
    head: Any = case.head(steps=steps)
    timesteps = case.arrays[f"{start}/timesteps"].tolist()
    assert head.schedule.kept(steps)[::-1] == timesteps
    noise, samples = case[f"{start}/noise"], case[f"{start}/samples"]
    samples = samples.reshape(steps, *noise.shape)
    predicted = case[f"{start}/noise_pred"].reshape(steps, *noise.shape)
    before = torch.cat([noise[None], samples[:-1]])
    visual = case.vla.see(request, case.places)
    for step, timestep in enumerate(timesteps):
        after = timesteps[step + 1] if step + 1 < steps else None

        def moved(noise: Tensor, step: int = step, now: int = timestep, after: int | None = after) -> Tensor:
            return head.schedule.ddim_step(before[step], noise, now, after, clip=True, renoise=False)[0]

        close(moved(predicted[step]), samples[step], 1e-6)
        own = head.noise(case.vla, request, before[step], torch.full((len(noise),), timestep), visual)
        close(own, predicted[step], 1e-4)
        close(moved(own), samples[step], 1e-4)
    for ours, theirs in zip(head.denoise(case.vla, request, noise), samples, strict=True):
        close(ours, theirs, 1e-3)


def test_noise_schedule(case: Case) -> None:
    needs(case, "diffusion")
    schedule = NoiseSchedule(case.meta["num_diffusion_steps_train"])
    close(torch.from_numpy(schedule.betas), case["ddim/betas"], 1e-6)
    close(torch.from_numpy(schedule.alphas_cumprod), case["ddim/alphas_cumprod"], 1e-6)
    close(
        schedule.noised(case.batch.actions, case["fwd/noise"], case["fwd/timesteps"]),
        case["fwd/noisy_actions"],
        1e-6,
    )
    table = case["ddim/time_embedding_table"]
    close(time_embedding(torch.arange(len(table)), table.shape[1]), table, 1e-6)


def test_noise_follows_the_sample(case: Case) -> None:
    """However a batch is dealt out to processes, and wherever a run goes on, a sample meets the same noise."""
    needs(case, "diffusion")
    head: Any = case.head()
    batch = case.batch
    noise, levels = head.draw(batch)
    assert (levels >= 0).all()
    assert (levels < head.schedule.steps).all()
    batch = replace(batch, numbers=batch.numbers[::-1], actions=batch.actions.flip(0))
    again, levels_again = head.draw(batch)
    assert torch.equal(noise, again.flip(0))
    assert torch.equal(levels, levels_again.flip(0))
    assert not torch.equal(noise[0], noise[1])
    other: Any = DiffusionHead(head.action_chunk, head.action_dim, seed=head.seed + 1)
    assert not torch.equal(other.draw(batch)[0], again)


def test_wrong_proprioception_is_noticed(case: Case) -> None:
    """Raw numbers, or numbers scaled by other bounds, move the actions far beyond rounding."""
    if not case.meta["proprio"]:
        pytest.skip("this variant reads no proprioception")
    batch = case.batch
    right = case["fwd/action_hidden"]
    for wrong in (case["raw_proprio"], 0.8 * batch.proprio, torch.zeros_like(batch.proprio)):
        batch = replace(batch, proprio=wrong)
        with torch.no_grad():
            assert (parallel_or_noisy(case, batch) - right).abs().max() > 100 * 2e-4
    batch = replace(batch, proprio=None)
    with pytest.raises(ValueError, match="proprioception, it was given none"):
        parallel_or_noisy(case, batch)


def parallel_or_noisy(case: Case, batch: Any) -> Tensor:
    if case.kind != "diffusion":
        return parallel_states(case.vla, batch, case.places)
    network: Any = case.vla.action_head
    extra = time_embedding(case["fwd/timesteps"], case.vla.llm.dim)[:, None]
    return case.vla.states(batch, slots=network.slots(case["fwd/noisy_actions"]), extra=extra, causal=False)


def test_head_without_its_shifted_norms_is_noticed(case: Case) -> None:
    """The smallest mistake known: the vision towers' epsilon in the head's norms."""
    needs(case, "l1")
    network = case.load().action_head
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    with torch.no_grad():
        assert (network(case["fwd/action_hidden"]) - case["fwd/head_out"]).abs().max() > 2e-4
