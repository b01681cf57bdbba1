// One bundle and a user's adapter with onnxruntime-android. A sketch: it was not built or run; see
// README.md for what is known.

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoraAdapter
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import kotlin.math.exp
import kotlin.time.Duration
import kotlin.time.measureTime

/** @param bundle the folder that `regrow export` wrote, as files: not in the APK's assets */
class Classifier(bundle: File) : Closeable {
    private val env = OrtEnvironment.getEnvironment()

    // By path, so that ONNX Runtime finds backbone.onnx.data beside it.
    private val session: OrtSession = OrtSession.SessionOptions().use { options ->
        env.createSession(File(bundle, "backbone.onnx").path, options)
    }
    private var adapter: OrtLoraAdapter? = null

    /**
     * Changes the user; null is the model alone. The session stays as it is.
     *
     * `file` comes from `regrow convert --to onnx_adapter`. It is mapped, not read, and has no
     * backbone id: nothing here notices an adapter of another backbone, `regrow convert` did.
     */
    fun swap(file: File?): Duration = measureTime {
        val next = file?.let { OrtLoraAdapter.create(it.absolutePath) } // throws, and nothing changed
        adapter?.close()
        adapter = next
    }

    /**
     * Logits of one image.
     *
     * @param pixels row by row, one channel after the other, prepared as the bundle's
     *     preprocessor_config.json says: for the demo, 8 x 8 grey levels, (level / 255 - 0.5) / 0.5
     */
    fun run(pixels: FloatArray, channels: Long, height: Long, width: Long): FloatArray {
        val shape = longArrayOf(1, channels, height, width)
        return OrtSession.RunOptions().use { options ->
            adapter?.let(options::addActiveLoraAdapter)
            OnnxTensor.createTensor(env, FloatBuffer.wrap(pixels), shape).use { tensor ->
                session.run(mapOf("pixel_values" to tensor), options).use { answers ->
                    @Suppress("UNCHECKED_CAST")
                    (answers["logits"].get().value as Array<FloatArray>)[0].copyOf()
                }
            }
        }
    }

    override fun close() {
        adapter?.close()
        session.close()
    }
}

fun softmax(logits: FloatArray): FloatArray {
    val most = logits.max()
    val powers = logits.map { exp(it - most) }
    val sum = powers.sum()
    return FloatArray(logits.size) { powers[it] / sum }
}

// In an application:
//
//   val files = context.filesDir
//   val classifier = Classifier(File(files, "bundle"))
//   val cost = classifier.swap(File(files, "slanted.onnx_adapter"))
//   val answer = softmax(classifier.run(pixels, channels = 1, height = 8, width = 8))
