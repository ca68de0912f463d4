"""Programs and graphs on disk: artefacts, ONNX."""
