"""From records to a policy: learner, regret, evaluation, report."""
