/* Decode a box of a JPEG with libjpeg-turbo: only its rows and columns, with the pixels of a full decode.
 *
 * Only baseline JPEGs with one scan and usual subsampling are decoded. For everything else, and for any error or warning of
 * libjpeg, the functions return None, and the caller decodes with Pillow.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or later is needed: earlier releases have errors in jpeg_skip_scanlines"
#endif

#define MIN_SIDE 32  /* libjpeg upsamples very narrow images in another way */
#define MARGIN 2     /* columns that upsampling reads beside a box */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf jump;
} errors;

typedef struct {
    Py_ssize_t left, top, width, height;
} box;

static void raise_error(j_common_ptr info) {
    longjmp(((errors *)info->err)->jump, 1);
}

static void stop_at_warning(j_common_ptr info, int level) {
    if (level < 0)
        raise_error(info);
}

static void print_nothing(j_common_ptr info) {
    (void)info;
}

/* Read the header, and return whether the image is one that this module decodes. */
static int read_header(j_decompress_ptr info, const unsigned char *data, size_t size) {
    jpeg_mem_src(info, (unsigned char *)data, (unsigned long)size);
    jpeg_save_markers(info, JPEG_APP0 + 1, 1);
    if (jpeg_read_header(info, TRUE) != JPEG_HEADER_OK)
        return 0;
    jpeg_component_info *parts = info->comp_info;
    return info->data_precision == 8 && !info->progressive_mode && !info->arith_code && info->num_components == 3 &&
           info->jpeg_color_space == JCS_YCbCr && !jpeg_has_multiple_scans(info) && info->image_width >= MIN_SIDE &&
           info->image_height >= MIN_SIDE && parts[0].v_samp_factor <= parts[0].h_samp_factor &&
           parts[0].h_samp_factor <= 2 && parts[1].h_samp_factor == 1 && parts[1].v_samp_factor == 1 &&
           parts[2].h_samp_factor == 1 && parts[2].v_samp_factor == 1;
}

/* Start a decompression whose errors and warnings return to `jump`. */
static void create(j_decompress_ptr info, errors *handler) {
    info->err = jpeg_std_error(&handler->base);
    handler->base.error_exit = raise_error;
    handler->base.emit_message = stop_at_warning;
    handler->base.output_message = print_nothing;
}

static int parse(const unsigned char *data, size_t size, unsigned *height, unsigned *width, int *has_app1) {
    struct jpeg_decompress_struct info;
    errors handler;
    int usable;
    memset(&info, 0, sizeof info);
    create(&info, &handler);
    if (setjmp(handler.jump)) {
        jpeg_destroy_decompress(&info);
        return 0;
    }
    jpeg_create_decompress(&info);
    usable = read_header(&info, data, size);
    *height = info.image_height;
    *width = info.image_width;
    *has_app1 = info.marker_list != NULL;
    jpeg_destroy_decompress(&info);
    return usable;
}

/* Write the pixels of a box, and return whether that was possible. */
static int decode(const unsigned char *data, size_t size, box part, int channels, unsigned char *out) {
    struct jpeg_decompress_struct info;
    errors handler;
    memset(&info, 0, sizeof info);
    create(&info, &handler);
    if (setjmp(handler.jump)) {
        jpeg_destroy_decompress(&info);
        return 0;
    }
    jpeg_create_decompress(&info);
    if (!read_header(&info, data, size) || part.left + part.width > (Py_ssize_t)info.image_width ||
        part.top + part.height > (Py_ssize_t)info.image_height) {
        jpeg_destroy_decompress(&info);
        return 0;
    }
    info.out_color_space = channels == 4 ? JCS_EXT_RGBX : JCS_EXT_RGB;
    info.dct_method = JDCT_ISLOW;  /* as Pillow */
    info.do_fancy_upsampling = TRUE;
    jpeg_start_decompress(&info);
    JDIMENSION first = (JDIMENSION)(part.left > MARGIN ? part.left - MARGIN : 0);
    Py_ssize_t end = part.left + part.width + MARGIN;
    if (end - first < MIN_SIDE)
        end = first + MIN_SIDE;
    if (end > (Py_ssize_t)info.image_width)
        end = info.image_width;
    if (end - first < MIN_SIDE)
        first = (JDIMENSION)(end - MIN_SIDE);
    JDIMENSION columns = (JDIMENSION)(end - first);
    if (columns < info.image_width)
        jpeg_crop_scanline(&info, &first, &columns);
    if (part.top > 0 && jpeg_skip_scanlines(&info, (JDIMENSION)part.top) != (JDIMENSION)part.top)
        raise_error((j_common_ptr)&info);
    size_t length = (size_t)(part.width * channels), offset = (size_t)((part.left - first) * channels);
    JSAMPROW row = info.mem->alloc_large((j_common_ptr)&info, JPOOL_IMAGE, (size_t)info.image_width * (size_t)channels);
    for (Py_ssize_t y = 0; y < part.height; y++) {
        if (jpeg_read_scanlines(&info, &row, 1) != 1)
            raise_error((j_common_ptr)&info);
        memcpy(out + (size_t)y * length, row + offset, length);
    }
    if (info.output_scanline == info.output_height)
        jpeg_finish_decompress(&info);  /* reads the end marker */
    jpeg_destroy_decompress(&info);
    return 1;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *py_parse(PyObject *self, PyObject *data) {
    char *bytes;
    Py_ssize_t size;
    unsigned height = 0, width = 0;
    int has_app1 = 0;
    (void)self;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    if (size == 0 || !parse((const unsigned char *)bytes, (size_t)size, &height, &width, &has_app1))
        return none();
    return Py_BuildValue("IIi", height, width, has_app1);
}

static PyObject *py_decode(PyObject *self, PyObject *args) {
    PyObject *data, *result;
    box part;
    int channels, decoded;
    char *bytes;
    Py_ssize_t size;
    (void)self;
    if (!PyArg_ParseTuple(args, "Snnnni", &data, &part.top, &part.left, &part.height, &part.width, &channels) ||
        PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    if ((channels != 3 && channels != 4) || part.top < 0 || part.left < 0 || part.height < 1 || part.width < 1 ||
        part.top > JPEG_MAX_DIMENSION || part.left > JPEG_MAX_DIMENSION || part.height > JPEG_MAX_DIMENSION ||
        part.width > JPEG_MAX_DIMENSION) {
        PyErr_SetString(PyExc_ValueError, "expected a box in the image and 3 or 4 channels");
        return NULL;
    }
    result = PyByteArray_FromStringAndSize(NULL, part.height * part.width * channels);
    if (result == NULL)
        return NULL;
    unsigned char *out = (unsigned char *)PyByteArray_AsString(result);
    Py_BEGIN_ALLOW_THREADS
    decoded = size > 0 && decode((const unsigned char *)bytes, (size_t)size, part, channels, out);
    Py_END_ALLOW_THREADS
    if (decoded)
        return result;
    Py_DECREF(result);
    return none();
}

static PyMethodDef methods[] = {
    {"parse", py_parse, METH_O,
     "parse(data)\n\nReturn (height, width, whether there is an APP1 segment) of a JPEG that `decode` accepts, else None."},
    {"decode", py_decode, METH_VARARGS,
     "decode(data, top, left, height, width, channels)\n\nReturn the pixels of a box as a bytearray, RGB or RGBX, or None."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_jpeg", "Decode boxes of JPEGs with libjpeg-turbo.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg(void) {
    return PyModule_Create(&module);
}
