"""Bugs in learning a policy and in judging it."""

from mutations import Mutation

LEARN = ("tests/test_learn.py",)
JUDGED = ("tests/test_evaluate.py",)


def learner(old: str, new: str, wrong: str, tests: tuple[str, ...] = LEARN, equivalent: str = "") -> Mutation:
    return Mutation("learn/learner.py", old, new, wrong, tests, equivalent)


def evaluate(old: str, new: str, wrong: str, tests: tuple[str, ...] = JUDGED, equivalent: str = "") -> Mutation:
    return Mutation("learn/evaluate.py", old, new, wrong, tests, equivalent)


def regret(old: str, new: str, wrong: str, tests: tuple[str, ...] = (*LEARN, *JUDGED)) -> Mutation:
    return Mutation("learn/regret.py", old, new, wrong, tests)


MUTATIONS = [
    learner("lower[1] = math.isqrt(a * b)", "lower[1] = b", "the bound is at the larger of two T"),
    learner("upper[0] = lower[1] + 1", "upper[0] = lower[1] + 2", "a T between two regimes belongs to none"),
    learner("if b <= self.options.max_gap * a:", "if True:", "gaps are closed however wide"),
    learner("price = math.log1p(self.options.tie_margin)", "price = 0.0", "a switch costs nothing"),
    learner(">= 1 - margin - _SLACK", ">= 1 - 2 * margin - _SLACK", "twice the margin is a tie"),
    learner(
        "max(self.options.tie_margin, float(np.median(noise)))", "float(np.median(noise))", "noise narrows the margin"
    ),
    learner("preferred = right & self.preferred", "preferred = self.preferred", "what wasn't right is preferred"),
    learner(
        "return math.fsum(p.log[choice] for p in points) / len(points)",
        "return max(p.log[choice] for p in points)",
        "the worst T decides",
    ),
    learner(
        "return min(among, key=lambda choice: (round(_score",
        "return max(among, key=lambda choice: (round(_score",
        "the slowest is chosen",
    ),
    learner("None if last else high", "high", "above the largest T the default runs"),
    learner(
        "return choice != default, choice in self.wrong,",
        "return choice != default, choice not in self.wrong,",
        "what was wrong is the first to fall back to",
    ),
    learner(
        "used = [r for r in records if not r.is_peer and", "used = [r for r in records if", "peers are learned from"
    ),
    learner(
        "learner.learn([p for p in points if p is not point])", "learner.learn(points)", "left out and yet learned from"
    ),
    learner("    _check_answers(workloads, points)\n", "", "a T at which all were wrong is passed over"),
    learner("if lower[1] is None or lower[1] >= above[0]:", "if lower[1] is None:", "regimes overlap"),
    evaluate(
        "return _mean(map(_mean, by_tokens.values()))",
        "return _mean(v for values in by_tokens.values() for v in values)",
        "mean over workloads instead of T",
    ),
    evaluate(
        "mean_log = {c: _mean(math.log(slowdowns[at][c])",
        "mean_log = {c: _mean((slowdowns[at][c])",
        "the bound by the arithmetic mean",
    ),
    evaluate("at, worst = max(regrets", "at, worst = min(regrets", "the least regret is called the worst"),
    evaluate("ours = [r for r in records if not r.is_peer]", "ours = list(records)", "peers are the oracle"),
    evaluate("noise = max((spread[c]", "noise = min((spread[c]", "noise of the quieter of two"),
    evaluate(
        "math.exp(_mean_over_tokens(logs)) - 1", "math.exp(-_mean_over_tokens(logs)) - 1", "a gain is called a loss"
    ),
    evaluate(
        "return self.regret <= (self.noise or 0.0)",
        "return self.regret <= (self.noise or 1.0)",
        "unknown noise hides a regret",
    ),
    regret("/ len(point.workloads) - 1", "/ len(point.workloads)", "a slowdown is called a regret"),
    regret(
        "key=lambda item: (item[1], -item[0])",
        "key=lambda item: (item[1], item[0])",
        "the largest T of equal worst ones",
    ),
]
