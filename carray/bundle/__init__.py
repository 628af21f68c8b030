"""bundle: the packed winner, the contract between the search and the classification job.

1. build        best weights of a trial -> weights.safetensors + model.onnx + probes.safetensors + bundle.json (last)
2. calibration  validation logits -> temperature
3. acceptance   validation scores -> the threshold from which labels are accepted, and what it promises
4. format       what bundle.json holds; loading with every hash checked, no code run, no pickle read
5. quantise     model.onnx + training pixels -> model.int8.onnx
6. certify      what int8 loses against fp32, in figures; the file stays only where that is little
7. originals    images of the manifest, read again: for an older bundle's int8, and to price reduced-scale decoding
8. runtimes     which runtime `auto` takes, and onnxruntime's sessions; torch_runtime is the one for GPUs
9. columns      logits -> label, score and the other columns of a row
10. predict     bundle -> scores, on a CPU without torch
11. winner      which trial RUN/bundle is of: the best, its refit, or the one that the user chose
"""
