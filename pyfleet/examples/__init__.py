"""P5: programs to start from; run them with pyfleet-launch -m pyfleet.examples.NAME."""
