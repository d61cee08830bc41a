"""What loading a pipeline says, and what it leaves out."""

import logging
import subprocess
import sys

from interp.models.diffusion_loading import _LOGGERS, _expected_messages_left_out


def test_loading_the_model_that_ships_writes_nothing_to_a_pipe():
    code = "import interp; interp.Diffusion.from_pretrained('zoo:tiny-diffusion')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_messages_are_still_logged_and_the_filter_goes_away():
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger(_LOGGERS[1]), Ear()
    expected = "Expected types for vae, got <class 'diffusers.models.autoencoders.autoencoder_tiny.AutoencoderTiny'>"
    logger.addHandler(ear)
    try:
        with _expected_messages_left_out():
            logger.warning("the weights do not fit")
            logger.warning(expected)
        logger.warning(expected)
    finally:
        logger.removeHandler(ear)
    assert heard == ["the weights do not fit", expected]
