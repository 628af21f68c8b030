"""bundle: the packed winner, the contract between the search and the classification job.

1. build        best weights of a trial -> weights.safetensors + model.onnx + probes.safetensors + bundle.json (last)
2. calibration  validation logits -> temperature
3. format       what bundle.json holds; loading with every hash checked, no code run, no pickle read
4. predict      bundle -> scores, with onnxruntime and without torch
5. winner       which trial RUN/bundle is of: the best, its refit, or the one that the user chose
"""
