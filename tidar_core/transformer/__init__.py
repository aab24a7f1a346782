"""The model and what its tokens may attend to."""
