"""bundle: the packed winner, the contract between the search and the classification job.

winner          which trial RUN/bundle holds: the best, its refit, or the one that the user chose
pack            the best weights of a trial -> weights.safetensors, model.onnx, probes.safetensors, bundle.json (last)
threshold       validation logits -> temperature, and the score from which labels are accepted
trained_on      which images the network was trained on, so that none of them judges it
quantise        model.onnx + training images -> int8 networks, and which layers must stay in floats
certificates    model.onnx + training images -> model.int8.onnx, and how its accuracy compares with fp32's
bundle_folder   what bundle.json holds; loading with every hash checked, no code run, no pickle read
runtimes        onnxruntime and PyTorch sessions, and which one `auto` takes
scorer          bundle + images -> logits -> label, score and the other columns of a row, on a CPU without torch
"""
