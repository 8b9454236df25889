"""Scores a local task of lm-eval in an environment that has it: `lm_eval_losses.py MODEL TASKS TASK,TASK RESULT`."""
import json, sys

import lm_eval
from lm_eval.tasks import TaskManager

if __name__ == '__main__':
    model, tasks, names, result = sys.argv[1:]
    found = lm_eval.simple_evaluate(
        model='hf', model_args=dict(pretrained=model, dtype='float32'), device='cpu', batch_size=3,
        tasks=names.split(','), task_manager=TaskManager(include_path=tasks, include_defaults=False),
        log_samples=True, bootstrap_iters=0)
    def scores(rows): return [[s['doc']['text'], s['filtered_resps'][0]] for s in rows]
    samples = {name: scores(rows) for name, rows in found['samples'].items()}
    numbers = {name: {k: v for k, v in row.items() if isinstance(v, float)} for name, row in found['results'].items()}
    with open(result, 'w') as f: json.dump(dict(samples=samples, results=numbers), f)
