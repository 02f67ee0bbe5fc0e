import warnings

from utils.run.errors import exit_cleanly


def test_what_torch_says_of_itself_is_not_shown_and_other_warnings_are(recwarn):
    def main():
        for message in (
            "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
            "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider",
            "the model is odd",
        ):
            warnings.warn(message, stacklevel=1)

    exit_cleanly(main)
    assert [str(warning.message) for warning in recwarn] == ["the model is odd"]
