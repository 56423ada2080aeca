"""Flow matching against openpi's numbers, and the two conventions against each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openvla_lightning.action_head.flow_matching import FlowMatching, Velocity, time_embedding
from openvla_lightning.action_head.flow_network import FlowNetwork


def sets(golden: Path, name: str) -> list[Path]:
    found = sorted((golden / "heads" / "flow_matching").rglob(name))
    assert found
    return found


def read(path: Path) -> dict[str, Tensor]:
    file = np.load(path)
    return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def close(found: Tensor, wanted: Tensor, within: float = 1e-6, what: object = None) -> None:
    torch.testing.assert_close(found, wanted, atol=within, rtol=within, check_dtype=False, msg=lambda m: f"{what}: {m}")


def times(flow: FlowMatching, count: int, seed: int = 0) -> Tensor:
    source = np.random.default_rng(seed)
    return flow.time(torch.tensor([flow.draw(source) for _ in range(count)]))


@pytest.mark.golden
def test_golden_formulas(golden: Path) -> None:
    flow = FlowMatching(noise_at=1)
    for path in sets(golden, "formulas.npz"):
        numbers = read(path)
        actions, noise, time = (numbers[f"interp/{name}"] for name in ("actions", "noise", "time"))
        close(flow.on_the_way(actions, noise, time), numbers["interp/x_t"])
        close(flow.target(actions, noise), numbers["interp/u_t"])
        loss = (numbers["interp/pred_v"] - flow.target(actions, noise)).square()
        close(loss, numbers["interp/loss_elementwise"])
        close(loss.mean(), numbers["interp/loss_mean"])
        for name in (n for n in numbers if n.startswith("sincos/dim")):
            width = numbers[name].shape[-1]
            close(time_embedding(numbers["sincos/time"], width), numbers[name], 1e-6, name)


@pytest.mark.golden
def test_golden_times(golden: Path) -> None:
    flow = FlowMatching(noise_at=1)
    for path in sets(golden, "formulas.npz"):
        numbers = read(path)
        drawn = times(flow, 100_000)
        quantiles = torch.quantile(drawn.double(), numbers["time/q"].double())
        close(quantiles, numbers["time/exact_quantiles"], 5e-3)
        close(drawn.double().mean(), numbers["time/mean_exact"], 2e-3)
        assert drawn.min() > 0
        assert drawn.max() <= 1


@pytest.mark.golden
def test_golden_euler(golden: Path) -> None:
    flow = FlowMatching(noise_at=1)
    for path in sets(golden, "formulas.npz"):
        numbers = read(path)
        noise, target = numbers["euler/noise"], numbers["euler/target"]
        fields: dict[str, Velocity] = {
            "const_to_target": lambda x, t, n=noise, a=target: n - a,
            "linear": lambda x, t, a=target: 0.8 * x - 0.3 * a + t[:, None, None],
            "posterior": lambda x, t, a=target: (x - a) / t[:, None, None],
        }
        for name in (n for n in numbers if n.startswith("euler/") and n.count("/") == 2):
            _, field, count = name.split("/")
            steps = list(flow.sample(fields[field], noise, int(count.removeprefix("n"))))
            close(steps[-1][0], numbers[name], 1e-6, name)
            close(torch.stack([time for _, time in steps]), numbers[f"euler/times_{count}"], what=name)


@pytest.mark.golden
def test_golden_loops_of_the_whole_models(golden: Path) -> None:
    """The released networks' velocities, fed back at the places where they were taken, give the released samples."""
    flow = FlowMatching(noise_at=1)
    for path in sets(golden, "golden.npz"):
        numbers = read(path)
        close(flow.on_the_way(numbers["actions"], numbers["noise"], numbers["time"]), numbers["train/x_t"])
        target = flow.target(numbers["actions"], numbers["noise"])
        close(target, numbers["train/u_t"])
        close((numbers["train/v_t"] - target).square(), numbers["train/loss_elementwise"], 1e-6)
        close((numbers["train/v_t"] - target).square().mean(), numbers["train/loss_mean"], 1e-6)
        for name in (n.removesuffix("/v") for n in numbers if n.endswith("/v")):
            velocities = iter(numbers[f"{name}/v"])
            places = numbers[f"{name}/x"]
            steps = list(flow.sample(lambda x, t, v=velocities: next(v), numbers["noise"], len(places)))
            close(steps[-1][0], numbers[f"{name}/actions"])
            for (moved, time), place, when in zip(steps, places[1:], numbers[f"{name}/times"], strict=False):
                close(moved, place, 1e-6, name)
                close(time, when)
        for counts in sets(golden, "loop_counts.json"):
            (different,) = json.loads(counts.read_text()).values()
            for count in set(range(1, 201)) - set(different):
                assert len(list(flow.sample(lambda x, t: x, torch.zeros(1, 1, 1), count))) == count


def test_both_conventions_are_the_same_way() -> None:
    down, up = FlowMatching(noise_at=1), FlowMatching(noise_at=0)
    actions, noise, time = torch.rand(5, 4, 3), torch.randn(5, 4, 3), torch.rand(5)
    close(down.on_the_way(actions, noise, time), up.on_the_way(actions, noise, 1 - time))
    close(down.target(actions, noise), -up.target(actions, noise))
    close(down.clean(down.on_the_way(actions, noise, time), down.target(actions, noise), time), actions)
    close(up.clean(up.on_the_way(actions, noise, time), up.target(actions, noise), time), actions)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x - 0.3 * actions + t[:, None, None]

    *_, (one, _) = down.sample(field, noise, 7)
    *_, (other, _) = up.sample(lambda x, t: -field(x, 1 - t), noise, 7)
    close(one, other, 1e-5)


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 1.0), (2.0, 2.0), (1.0, 1.5)])
def test_times_are_those_of_the_distribution(noise_at: int, alpha: float, beta: float) -> None:
    flow = FlowMatching(noise_at, alpha, beta, scale=1.0, offset=0.0)  # type: ignore[arg-type]
    drawn = times(flow, 40_000)
    share = drawn if noise_at == 1 else 1 - drawn
    mean = alpha / (alpha + beta)
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert abs(share.mean() - mean) < 5 * (variance / 40_000) ** 0.5
    assert abs(share.var() - variance) < 0.1 * variance


def test_a_network_stands_still_learns_and_sees_only_what_is_there() -> None:
    torch.manual_seed(0)
    flow, network = FlowMatching(), FlowNetwork(12, 3, 4, width=32, depth=2, heads=4, proprio_dim=2)
    context, mask, proprio = torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 2)
    mask[1, 3:] = False
    actions = torch.stack([torch.full((4, 3), 0.5), torch.full((4, 3), -0.5)])
    moving, time = torch.randn(2, 4, 3), torch.tensor([0.3, 0.9])
    assert not network(moving, time, network.read(context), mask, proprio).any()
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for step in range(120):
        time = times(flow, 16, seed=step)
        noise = torch.randn(16, 4, 3, generator=torch.Generator().manual_seed(step))
        many = [x.repeat(8, *[1] * (x.ndim - 1)) for x in (actions, context, mask, proprio)]
        velocity = network(flow.on_the_way(many[0], noise, time), time, *many[1:])
        loss = (velocity - flow.target(many[0], noise)).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    with torch.inference_mode():
        noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(7))

        def sample(rows: slice, context: Tensor) -> Tensor:
            seen = network.read(context[rows])
            *_, (found, _) = flow.sample(lambda x, t: network(x, t, seen, mask[rows], proprio[rows]), noise[rows])
            return found

        both = sample(slice(None), context)
        assert (both - actions).abs().mean() < 0.2
        close(sample(slice(1, 2), context), both[1:], 1e-5)  # in a batch as alone
        context[1, 3:] += 5.0
        close(sample(slice(None), context), both, 1e-6)  # padding is not seen
    with pytest.raises(ValueError, match="no proprio"):
        network(moving, time[:2], network.read(context), mask)


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="noise_at=2 must be 1, as in pi0, or 0"):
        FlowMatching(noise_at=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of heads=3"):
        FlowNetwork(8, 7, 4, width=32, heads=3)
