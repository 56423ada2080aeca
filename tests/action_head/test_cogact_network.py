"""CogACT's schedules, network, losses, samplers and ensembles against the released code's numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openvla_lightning.action_head.cogact_network import CogACTNetwork, timestep_embedding
from openvla_lightning.action_head.noise_schedule import NoiseSchedule, Predict
from openvla_lightning.evaluation.ensemble import AdaptiveEnsemble, TemporalEnsemble

pytestmark = pytest.mark.golden


def cogact(golden: Path) -> Path:
    return golden / "heads" / "cogact"


def models(golden: Path) -> list[Path]:
    found = sorted(path.parent for path in cogact(golden).rglob("action_model.safetensors"))
    assert found
    return found


def network(folder: Path) -> CogACTNetwork:
    size: dict[str, int] = json.loads((folder / "config.json").read_text())["cfg"]
    made = CogACTNetwork(size["token"], size["dim"], size["T"], size["hidden"], size["depth"], size["heads"])
    state = load_file(folder / "action_model.safetensors")
    made.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    return made.eval()


class Numbers:
    """A file of arrays, as tensors."""

    def __init__(self, path: Path) -> None:
        self.file = np.load(path)
        self.files: list[str] = self.file.files

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.file[name])


def close(found: Tensor, wanted: Tensor, within: float = 1e-5, what: Any = None) -> None:
    torch.testing.assert_close(found, wanted, atol=within, rtol=within, check_dtype=False, msg=lambda m: f"{what}: {m}")


def guided(net: CogACTNetwork, cognition: Tensor, scale: float) -> Predict:
    return lambda noisy, timestep: net.guided(noisy, timestep, cognition, scale)


def scales(numbers: Numbers, kind: str) -> list[tuple[str, float]]:
    """Names of the samples of a kind with guidance alone, and their scales."""
    names = [n.removesuffix("/sample") for n in numbers.files if n.startswith(kind) and n.endswith("/sample")]
    return [(n, float(n.rpartition("cfg")[2])) for n in names if n.rpartition("cfg")[2].replace(".", "").isdigit()]


def test_schedules(golden: Path) -> None:
    file = np.load(cogact(golden) / "schedules.npz")
    for name in {key.rpartition("/")[0] for key in file.files if key.endswith("/posterior_variance")}:
        kind, steps = name.split("/")
        schedule = NoiseSchedule(int(steps), kind)  # type: ignore[arg-type]
        for table in ("betas", "alphas_cumprod"):
            np.testing.assert_allclose(getattr(schedule, table), file[f"{name}/{table}"], rtol=1e-12)
        one, times = torch.ones(int(steps), 1, 1), torch.arange(int(steps))
        mean, log_variance = schedule.posterior(0 * one, one, times)
        close(mean.flatten(), torch.from_numpy(file[f"{name}/posterior_mean_coef1"]), 1e-6)
        close(
            schedule.posterior(one, 0 * one, times)[0].flatten(), torch.from_numpy(file[f"{name}/posterior_mean_coef2"])
        )
        close(log_variance.flatten(), torch.from_numpy(file[f"{name}/posterior_log_variance_clipped"]))
        close(
            schedule.clean(one, 0 * one, times).flatten(), torch.from_numpy(file[f"{name}/sqrt_recip_alphas_cumprod"])
        )
    schedule = NoiseSchedule(100)
    for name in {key.split("/")[0] for key in file.files if key.startswith("ddim")}:
        kept = schedule.kept(int(name.removeprefix("ddim")))
        assert kept == file[f"{name}/timestep_map"].tolist()
        np.testing.assert_allclose(schedule.alphas_cumprod[kept], file[f"{name}/alphas_cumprod"], rtol=1e-12)
    for key in (key for key in file.files if key.startswith("timestep_embedding")):
        rows, width = file[key].shape
        timesteps = torch.arange(0, schedule.steps, -(-schedule.steps // rows))  # spread over all of them
        close(timestep_embedding(timesteps, width), torch.from_numpy(file[key]), 1e-5, key)


def test_counts_of_steps(golden: Path) -> None:
    schedule = NoiseSchedule(100)
    for count, kept in json.loads((cogact(golden) / "ddim_timesteps_of_100.json").read_text()).items():
        if kept is not None:
            assert schedule.kept(int(count)) == kept
            continue
        with pytest.raises(ValueError, match=f"{count} steps do not divide 100 timesteps; the nearest"):
            schedule.kept(int(count))


def test_forward(golden: Path) -> None:
    for folder in models(golden):
        net, numbers = network(folder), Numbers(folder / "golden.npz")
        noisy, timestep, cognition = (numbers[f"fwd/{name}"] for name in "xtz")
        close(net.t_embedder(timestep), numbers["fwd/t_emb"])
        close(net.z_embedder(cognition, None), numbers["fwd/z_emb"])
        close(net(noisy, timestep, cognition), numbers["fwd/out"], what=folder)
        dropped = numbers["drop/force_ids"] == 1
        close(net.z_embedder(cognition, dropped), numbers["drop/z_emb"])
        for name in (n for n in numbers.files if n.startswith("cfg/")):
            scale = float(name.removeprefix("cfg/out_scale"))
            close(net.guided(noisy, timestep, cognition, scale), numbers[name][: len(noisy)], what=name)


def test_losses_and_gradients(golden: Path) -> None:
    schedule = NoiseSchedule(100)
    for folder in models(golden):
        numbers = Numbers(folder / "golden.npz")
        for mode in ("eval", "train"):
            net = network(folder)
            noise, timestep = numbers[f"loss_{mode}/noise"], numbers[f"loss_{mode}/timestep"]
            noisy = schedule.noised(numbers["loss/actions"], noise, timestep)
            close(noisy, numbers[f"loss_{mode}/x_t"], 1e-6)
            drop = numbers["loss_train/drop_uniform"] < net.drop if mode == "train" else None
            loss = (net(noisy, timestep, numbers["loss/z"], drop) - noise).square().mean()
            close(loss, numbers[f"loss_{mode}/loss"], 1e-6, mode)
            loss.backward()
            gradients = load_file(folder / f"grads_{mode}.safetensors")
            for name, parameter in net.named_parameters():
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                close(found, gradients.get(f"net.{name}", torch.zeros_like(parameter)), what=name)


@torch.inference_mode()
def test_samples(golden: Path) -> None:
    schedule = NoiseSchedule(100)
    for folder in models(golden):
        net, numbers = network(folder), Numbers(folder / "golden.npz")
        noise, cognition = numbers["sample/noise"], numbers["sample/z"]
        for name, scale in scales(numbers, "ddim"):
            predict = guided(net, cognition, scale)
            count = int(name.partition("_")[0].removeprefix("ddim"))
            steps = list(schedule.ddim(predict, noise, count))
            # fifty strongly guided steps add up rounding: the released code's own floats differ by as much
            close(steps[-1][0], numbers[f"{name}/sample"], 1e-5 if count <= 10 and scale < 3 else 1e-3, name)
            if f"{name}/trajectory" in numbers.files:
                close(torch.stack([x for x, _ in steps]), numbers[f"{name}/trajectory"], 3e-5, name)
                close(torch.stack([x for _, x in steps]), numbers[f"{name}/pred_xstart"], 1e-3, name)
        *_, (last, _) = schedule.ddim(guided(net, cognition, 1.5), noise, 10, clip=True)
        close(last, numbers["ddim10_cfg1.5_clip/sample"], 1e-5)
        draws = numbers["ddim10_cfg1.0_eta1.0/step_noise"]
        *_, (last, _) = schedule.ddim(guided(net, cognition, 1.0), noise, 10, eta=1.0, draws=draws)
        close(last, numbers["ddim10_cfg1.0_eta1.0/sample"], 1e-4)


@torch.inference_mode()
def test_ddpm_steps(golden: Path) -> None:
    schedule = NoiseSchedule(100)
    for folder in models(golden):
        net, numbers = network(folder), Numbers(folder / "golden.npz")
        noise, cognition = numbers["sample/noise"], numbers["sample/z"]
        mean, log_variance = schedule.posterior(
            numbers["fwd/x"],
            schedule.clean(numbers["fwd/x"], numbers["fwd/out"], numbers["fwd/t"]),
            numbers["fwd/t"],
        )
        size = numbers["post/clip0/mean"].abs().max().item()
        close(mean, numbers["post/clip0/mean"], 1e-5 * max(size, 1))
        close(log_variance.expand_as(mean), numbers["post/log_variance"], 1e-5)
        for name, scale in scales(numbers, "ddpm"):
            predict = guided(net, cognition, scale)
            draws = numbers[f"{name}/step_noise"]
            *_, (last, _) = schedule.ddpm(predict, noise, draws)
            close(last, numbers[f"{name}/sample"], 1e-2, name)
            if f"{name}/trajectory" not in numbers.files:
                continue
            trajectory = torch.cat([noise[None], numbers[f"{name}/trajectory"]])
            for step, now in enumerate(
                reversed(range(schedule.steps))
            ):  # the chain is badly conditioned, a step is not
                timestep = torch.full((len(noise),), now)
                clean = schedule.clean(trajectory[step], predict(trajectory[step], timestep), timestep)
                mean, log_variance = schedule.posterior(trajectory[step], clean, timestep)
                after = mean if now == 0 else mean + (0.5 * log_variance).exp() * draws[step]
                close(after, trajectory[step + 1], 1e-4, (name, now))


def test_ensembles(golden: Path) -> None:
    for path in sorted(cogact(golden).rglob("adaptive_ensemble.npz")):
        file = np.load(path)
        for name in (n for n in file.files if "/h" in n):
            group, _, what = name.partition("/h")
            horizon, alpha = what.split("_alpha")
            ensemble = AdaptiveEnsemble(int(horizon), float(alpha))
            memory: Any = ()
            inputs = {"one_d": "one_d/actions", "reset_after5": "T16D7/chunks"}.get(group, f"{group}/chunks")
            for step, wanted in enumerate(file[name]):
                if group == "reset_after5" and step == 5:
                    memory = ()
                memory, action = ensemble.step(memory, file[inputs][step])
                np.testing.assert_allclose(action, wanted, atol=1e-12, err_msg=f"{name} step {step}")


def test_temporal_ensemble_is_the_mean_where_nothing_decays() -> None:
    chunks = np.random.default_rng(0).normal(size=(6, 4, 7))
    flat, late = TemporalEnsemble(3, 0.0), TemporalEnsemble(3, -100.0)
    memory: Any = ()
    other: Any = ()
    for now, chunk in enumerate(chunks):
        memory, action = flat.step(memory, chunk)
        seen = [chunks[now - age][age] for age in range(min(3, now + 1))]
        np.testing.assert_allclose(action, np.mean(seen, axis=0))
        other, newest = late.step(other, chunk)
        np.testing.assert_allclose(newest, chunk[0])
    with pytest.raises(ValueError, match="give horizon=4 at most"):
        TemporalEnsemble(9).step((chunks[0],) * 8, chunks[0])
