"""What a worker can be asked to measure: each module has `run(case, report) -> result`.

`case` is the JSON object that the worker was given; `result` goes back as JSON. Times are in
milliseconds, memory in bytes.
"""
