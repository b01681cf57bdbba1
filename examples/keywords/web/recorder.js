// Runs in the browser's audio thread: hands on what the microphone gives, 128 samples at a time.
registerProcessor("recorder", class extends AudioWorkletProcessor {
  process([[samples]]) {
    if (samples) this.port.postMessage(samples.slice());
    return true;
  }
});
