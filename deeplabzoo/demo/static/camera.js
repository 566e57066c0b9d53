// The webcam as a row of photos: the next picture is taken when the last one has been shown.

const QUALITY = 0.9;

export async function* cameraPhotos(stopped) {
  if (!navigator.mediaDevices) throw new Error("Browsers give the webcam only to pages of this computer (127.0.0.1) or over https.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } });
  } catch (error) {
    throw new Error(`The webcam cannot be used (${error.name}); allow it in the browser, or connect one.`);
  }
  try {
    const video = document.createElement("video");
    video.muted = true;
    video.srcObject = stream;
    await video.play();
    const canvas = document.createElement("canvas");
    while (!stopped()) {
      canvas.width = video.videoWidth;
      canvas.height = video.videoHeight;
      canvas.getContext("2d").drawImage(video, 0, 0);
      yield await new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
    }
  } finally {
    for (const track of stream.getTracks()) track.stop();
  }
}
