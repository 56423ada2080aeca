"""CogACT's schedules, network, losses, samplers and ensembles against the released code's numbers."""

import json
import re
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


def samples(numbers: Numbers, kind: str) -> list[tuple[str, int, float, bool, float]]:
    """Name, steps, guidance, clipping and eta of each sample of a kind, as their names say."""
    form = re.compile(rf"({kind}(\d+)_cfg([\d.]+)(_clip)?(?:_eta([\d.]+))?)/sample")
    told = [match.groups() for match in map(form.fullmatch, numbers.files) if match]
    assert told
    return [(name, int(steps), float(scale), bool(clip), float(eta or 0)) for name, steps, scale, clip, eta in told]


def schedule_of(numbers: Numbers) -> NoiseSchedule:
    """The schedule of the training: DDPM takes all of its steps."""
    return NoiseSchedule(samples(numbers, "ddpm")[0][1])


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
    counts = {key.split("/")[0]: int(key.split("/")[0].removeprefix("ddim")) for key in file.files if key[:4] == "ddim"}
    schedule = NoiseSchedule(max(counts.values()))
    for name, count in counts.items():
        kept = schedule.kept(count)
        assert kept == file[f"{name}/timestep_map"].tolist()
        np.testing.assert_allclose(schedule.alphas_cumprod[kept], file[f"{name}/alphas_cumprod"], rtol=1e-12)
    for key in (key for key in file.files if key.startswith("timestep_embedding")):
        rows, width = file[key].shape
        timesteps = torch.arange(0, schedule.steps, -(-schedule.steps // rows))  # spread over all of them
        close(timestep_embedding(timesteps, width), torch.from_numpy(file[key]), 1e-5, key)


def test_counts_of_steps(golden: Path) -> None:
    for path in (found := list(cogact(golden).glob("ddim_timesteps_of_*.json"))):
        schedule = NoiseSchedule(int(path.stem.rpartition("_")[2]))
        for count, kept in json.loads(path.read_text()).items():
            if kept is not None:
                assert schedule.kept(int(count)) == kept
                continue
            with pytest.raises(
                ValueError, match=f"{count} steps do not divide {schedule.steps} timesteps; the nearest"
            ):
                schedule.kept(int(count))
    assert found


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
    for folder in models(golden):
        numbers = Numbers(folder / "golden.npz")
        schedule = schedule_of(numbers)
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
    for folder in models(golden):
        net, numbers = network(folder), Numbers(folder / "golden.npz")
        schedule, noise, cognition = schedule_of(numbers), numbers["sample/noise"], numbers["sample/z"]
        for name, count, scale, clip, eta in samples(numbers, "ddim"):
            draws = numbers[f"{name}/step_noise"] if eta else None
            steps = list(schedule.ddim(guided(net, cognition, scale), noise, count, clip, eta=eta, draws=draws))
            # fifty strongly guided steps add up rounding: the released code's own floats differ by as much
            within = 1e-4 if eta else 1e-5 if count <= 10 and scale < 3 else 1e-3
            close(steps[-1][0], numbers[f"{name}/sample"], within, name)
            if f"{name}/trajectory" in numbers.files:
                close(torch.stack([x for x, _ in steps]), numbers[f"{name}/trajectory"], 3e-5, name)
                close(torch.stack([x for _, x in steps]), numbers[f"{name}/pred_xstart"], 1e-3, name)


@torch.inference_mode()
def test_ddpm_steps(golden: Path) -> None:
    for folder in models(golden):
        net, numbers = network(folder), Numbers(folder / "golden.npz")
        schedule, noise, cognition = schedule_of(numbers), numbers["sample/noise"], numbers["sample/z"]
        clean = schedule.clean(numbers["fwd/x"], numbers["fwd/out"], numbers["fwd/t"])
        for case, start in (("post/clip0", clean), ("post/clip1", clean.clamp(-1, 1))):
            mean, log_variance = schedule.posterior(numbers["fwd/x"], start, numbers["fwd/t"])
            close(mean, numbers[f"{case}/mean"], 1e-5 * max(numbers[f"{case}/mean"].abs().max().item(), 1), case)
            close(log_variance.expand_as(mean), numbers["post/log_variance"], 1e-5)
        for name, _, scale, clip, _ in samples(numbers, "ddpm"):
            predict = guided(net, cognition, scale)
            draws = numbers[f"{name}/step_noise"]
            *_, (last, _) = schedule.ddpm(predict, noise, draws, clip)
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
            inputs = [n for n in (f"{group}/chunks", f"{group}/actions") if n in file.files]
            inputs += [n for n in file.files if n.endswith("/chunks") and file[n].shape[-1] == file[name].shape[-1]]
            forgets = int(group.removeprefix("reset_after")) if group.startswith("reset_after") else None
            for step, wanted in enumerate(file[name]):
                memory = () if step == forgets else memory
                memory, action = ensemble.step(memory, file[inputs[0]][step])
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
