"""Scores samples with evalplus in an environment that has it: `evalplus_scores.py DATASET PROBLEMS SAMPLES RESULT`.

PROBLEMS are lines with task_id, prompt, canonical_solution, entry_point and `inputs`, the arguments of every test, as
Python. Of MBPP, problems are left out whose arguments evalplus would not read from JSON as they are, and their samples:
it turns lists into tuples for the problems that it has by itself."""
import ast, json, os, sys

def lines(file): return [json.loads(line) for line in open(file)]

def same(a, b): # types as well: (1,) is not [1]
    if type(a) is not type(b): return False
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def readable(p, inputs): # the arguments as evalplus reads them from JSON, or None where that fails
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    try: read = mbpp_deserialize_inputs(p['task_id'], json.loads(json.dumps(inputs)))
    except (TypeError, ValueError, IndexError, AttributeError): return False
    return same([list(x) for x in read], [list(x) for x in inputs])

if __name__ == '__main__':
    dataset, problems, samples, result = sys.argv[1:]
    own, kept = f'{result}.problems.jsonl', f'{result}.samples.jsonl'
    os.environ[dict(humaneval='HUMANEVAL', mbpp='MBPP')[dataset] + '_OVERRIDE_PATH'] = own # read when it is imported
    with open(own, 'w') as f:
        names = set()
        for p in lines(problems):
            inputs = ast.literal_eval(p.pop('inputs'))
            if dataset == 'mbpp' and not readable(p, inputs): continue
            names.add(p['task_id'])
            atol = 1e-4 if p['entry_point'] == 'find_zero' else 0 # what HumanEval's own test allows
            f.write(json.dumps(dict(p, contract='', atol=atol, base_input=inputs, plus_input=[])) + '\n')
    with open(kept, 'w') as f: f.writelines(json.dumps(s) + '\n' for s in lines(samples) if s['task_id'] in names)
    from evalplus.evaluate import evaluate
    evaluate(dataset, kept, base_only=True, parallel=2, min_time_limit=5.)
    found = json.load(open(kept.replace('.jsonl', '_eval_results.json')))['eval']
    json.dump({task: [r['base_status'] for r in rows] for task, rows in found.items()}, open(result, 'w'))
