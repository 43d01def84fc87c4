/* Pool stored label maps under boxes, from their bytes to soft labels, without tensors in between.
 *
 * The arithmetic is that of the NumPy code in `weights.line_weights` and `encodings`, up to rounding. `check` accepts the values that
 * `Encoding.decode` accepts. Batches with other values, and views that are not upright boxes, are left to the Python code.
 *
 * Shapes: K logits are stored at each of H x W locations. 4-bit levels are packed as in `encodings/levels.py`.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLACK 1e-4         /* locations, see weights.py */
#define UPRIGHT 1e-9       /* see view.py */
#define MAX_POINTS 100000  /* of a line; longer ones are left to the closed form in Python */
#define VIEW 10            /* numbers of a view: its map, then its visible box */

typedef struct {
    int is_topk, bits;
    Py_ssize_t num_classes, k, height, width;
    Py_ssize_t logits, classes, class_size, base, ranges;  /* offsets in the bytes; -1 if there is no such tensor */
    Py_ssize_t end;
} layout;

typedef struct {
    float *rows, *columns;  /* weights of the locations */
    Py_ssize_t row_start, row_end, column_start, column_end;  /* where they are not zero */
    float *means;           /* of the K heatmaps */
    float *sums;            /* of two heatmaps over rows */
    unsigned char *seen;    /* whether a class has a heatmap */
} scratch;

static float half_at(const unsigned char *data) {
    uint32_t stored = (uint32_t)data[0] | (uint32_t)data[1] << 8;
    union {
        uint32_t bits;
        float value;
    } result;
    result.bits = (stored & 0x7fffu) << 13;
    result.value *= 0x1p112f;
    result.bits |= (stored & 0x8000u) << 16;
    return result.value;
}

static int are_finite(const unsigned char *data, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++)
        if ((data[2 * i + 1] & 0x7c) == 0x7c)
            return 0;
    return 1;
}

static Py_ssize_t class_at(const layout *form, const unsigned char *data, Py_ssize_t i) {
    data += form->classes + i * form->class_size;
    if (form->class_size == 1)
        return data[0];
    if (form->class_size == 2)
        return data[0] | data[1] << 8;
    return (Py_ssize_t)((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24);
}

/* Return the number of bytes of n values with the bits of the storage dtype. */
static Py_ssize_t stored_bytes(const layout *form, Py_ssize_t n, Py_ssize_t size) {
    return (form->bits == 4 ? (n + 1) / 2 : n) * size * (form->bits == 16 ? 2 : 1);
}

static Py_ssize_t num_stored_classes(const layout *form) {
    return form->is_topk ? form->k * form->height * form->width : form->k;
}

static int fits(const layout *form, Py_ssize_t start, Py_ssize_t size) {
    return start >= 0 && size >= 0 && start <= form->end - size;
}

static int read_layout(PyObject *tuple, layout *form) {
    const Py_ssize_t most = 1 << 24;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "the layout must be a tuple");
        return 0;
    }
    if (!PyArg_ParseTuple(tuple, "iinnnnnnnnnn", &form->is_topk, &form->bits, &form->num_classes, &form->k, &form->height,
                          &form->width, &form->logits, &form->classes, &form->class_size, &form->base, &form->ranges, &form->end))
        return 0;
    int usable = (form->bits == 4 || form->bits == 8 || form->bits == 16) && !(form->is_topk && form->bits == 4) &&
                 (form->class_size == 1 || form->class_size == 2 || form->class_size == 4) && form->num_classes >= 2 &&
                 form->num_classes <= most && form->k >= 1 && form->k <= form->num_classes && form->height >= 1 &&
                 form->width >= 1 && form->height <= most && form->width <= most / form->height &&
                 form->height * form->width <= ((Py_ssize_t)1 << 31) / form->k;
    usable = usable && fits(form, form->logits, stored_bytes(form, form->k, form->height * form->width)) &&
             fits(form, form->classes, num_stored_classes(form) * form->class_size) &&
             (form->is_topk || fits(form, form->base, stored_bytes(form, form->num_classes, 1))) &&
             (form->bits == 16 || fits(form, form->ranges, 4 * (form->k + !form->is_topk)));
    if (!usable)
        PyErr_SetString(PyExc_ValueError, "this is not the layout of a label map");
    return usable;
}

/* Return pointers to the bytes of a tuple of blobs, or NULL. */
static const unsigned char **read_blobs(PyObject *blobs, const layout *form, Py_ssize_t *count) {
    if (!PyTuple_Check(blobs)) {
        PyErr_SetString(PyExc_TypeError, "the label maps must be a tuple of bytes");
        return NULL;
    }
    *count = PyTuple_Size(blobs);
    const unsigned char **data = malloc((size_t)(*count + 1) * sizeof *data);
    if (data == NULL)
        return (const unsigned char **)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < *count; i++) {
        char *bytes;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(blobs, i), &bytes, &size) < 0) {
            free(data);
            return NULL;
        }
        if (size != form->end) {
            free(data);
            PyErr_SetString(PyExc_ValueError, "the bytes do not have the length of their layout");
            return NULL;
        }
        data[i] = (const unsigned char *)bytes;
    }
    return data;
}

static int is_valid(const layout *form, const unsigned char *data, unsigned char *seen) {
    Py_ssize_t count = num_stored_classes(form);
    if (!form->is_topk)
        memset(seen, 0, (size_t)form->num_classes);
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t index = class_at(form, data, i);
        if (index >= form->num_classes || (!form->is_topk && seen[index]))
            return 0;
        if (!form->is_topk)
            seen[index] = 1;
    }
    if (form->bits != 16)
        return are_finite(data + form->ranges, 2 * (form->k + !form->is_topk));
    return are_finite(data + form->logits, form->k * form->height * form->width) &&
           (form->is_topk || are_finite(data + form->base, form->num_classes));
}

/* Write the weights of locations, and return whether any part of the line is visible; -1 if it has too many points. */
static int line_weights(double start, double end, double low, double high, Py_ssize_t length, float *weights) {
    float scale = (float)length, first = (float)start * scale - 0.5f;
    double extent = (double)((float)end * scale - 0.5f - first), position = first;
    double least = (float)low * scale - 0.5f, most = (float)high * scale - 0.5f;
    double near = fmin(position, position + extent), far = fmax(position, position + extent);
    if (near < least - SLACK || far > most + SLACK) {
        position = fmax(near, least);
        extent = fmin(far, most) - position;
        if (extent <= 0)
            return 0;
    }
    if (fabs(extent) > MAX_POINTS)
        return -1;
    double num_points = fmax(1, ceil(fabs(extent))), step = extent / num_points;
    memset(weights, 0, (size_t)length * sizeof *weights);
    position += step / 2;
    for (Py_ssize_t i = 0; i < (Py_ssize_t)num_points; i++, position += step) {
        if (position <= 0) {
            weights[0] += 1;
        } else if (position >= (double)(length - 1)) {
            weights[length - 1] += 1;
        } else {
            Py_ssize_t location = (Py_ssize_t)position;
            float fraction = (float)(position - (double)location);
            weights[location] += 1 - fraction;
            weights[location + 1] += fraction;
        }
    }
    for (Py_ssize_t i = 0; i < length; i++)
        weights[i] /= (float)num_points;
    return 1;
}

static void find_range(const float *weights, Py_ssize_t length, Py_ssize_t *start, Py_ssize_t *end) {
    for (*start = 0; *start < length - 1 && weights[*start] == 0; ++*start)
        ;
    for (*end = length; *end > *start + 1 && weights[*end - 1] == 0; --*end)
        ;
}

/* Compute the weights of a view. Return whether any part of it is visible; -1 if it is left to Python. */
static int weights_of(const layout *form, const double *view, scratch *memory) {
    for (int i = 0; i < VIEW; i++)
        if (!isfinite(view[i]))
            return -1;
    if (fabs(view[1]) + fabs(view[3]) >= UPRIGHT)
        return -1;
    int rows = line_weights(view[5], view[5] + view[4], view[7], view[9], form->height, memory->rows);
    int columns = line_weights(view[2], view[2] + view[0], view[6], view[8], form->width, memory->columns);
    if (rows < 0 || columns < 0)
        return -1;
    if (rows == 0 || columns == 0) {  /* the means of heatmaps are their base */
        for (Py_ssize_t i = 0; i < form->height; i++)
            memory->rows[i] = 1 / (float)form->height;
        for (Py_ssize_t i = 0; i < form->width; i++)
            memory->columns[i] = 1 / (float)form->width;
    }
    find_range(memory->rows, form->height, &memory->row_start, &memory->row_end);
    find_range(memory->columns, form->width, &memory->column_start, &memory->column_end);
    return rows && columns;
}

/* Return the value of level 0 and the difference between levels. */
static float range_at(const layout *form, const unsigned char *data, Py_ssize_t i, float *step) {
    float low = half_at(data + form->ranges + 4 * i), high = half_at(data + form->ranges + 4 * i + 2);
    *step = (high - low) * (float)(1.0 / ((1 << form->bits) - 1));
    return low;
}

/* Write the means of the heatmaps. Rows are added first, so that compilers can vectorize the loops over columns. */
static void pool_heatmaps(const layout *form, const unsigned char *data, const scratch *memory) {
    Py_ssize_t size = form->bits == 16 ? 2 : 1, planes = form->bits == 4 ? (form->k + 1) / 2 : form->k;
    Py_ssize_t start = memory->column_start, width = memory->column_end - start;
    float *lower = memory->sums, *upper = memory->sums + width;
    const float *weights = memory->columns + start;
    for (Py_ssize_t plane = 0; plane < planes; plane++) {
        memset(memory->sums, 0, 2 * (size_t)width * sizeof *memory->sums);
        for (Py_ssize_t y = memory->row_start; y < memory->row_end; y++) {
            const unsigned char *line = data + form->logits + ((plane * form->height + y) * form->width + start) * size;
            float weight = memory->rows[y];
            if (form->bits == 4)
                for (Py_ssize_t x = 0; x < width; x++) {
                    lower[x] += weight * (float)(line[x] & 15);
                    upper[x] += weight * (float)(line[x] >> 4);
                }
            else if (form->bits == 8)
                for (Py_ssize_t x = 0; x < width; x++)
                    lower[x] += weight * (float)line[x];
            else
                for (Py_ssize_t x = 0; x < width; x++)
                    lower[x] += weight * half_at(line + 2 * x);
        }
        float of_lower = 0, of_upper = 0;
        for (Py_ssize_t x = 0; x < width; x++) {
            of_lower += weights[x] * lower[x];
            of_upper += weights[x] * upper[x];
        }
        memory->means[plane] = of_lower;
        if (form->bits == 4 && plane + planes < form->k)
            memory->means[plane + planes] = of_upper;
    }
    if (form->bits != 16)
        for (Py_ssize_t i = 0; i < form->k; i++) {
            float step, low = range_at(form, data, i, &step);
            memory->means[i] = low + step * memory->means[i];
        }
}

static void look_up(const layout *form, const unsigned char *levels, const float *table, float *out) {
    Py_ssize_t half = (form->num_classes + 1) / 2;
    if (form->bits == 8) {
        for (Py_ssize_t i = 0; i < form->num_classes; i++)
            out[i] = table[levels[i]];
        return;
    }
    for (Py_ssize_t i = 0; i < half; i++)
        out[i] = table[levels[i] & 15];
    for (Py_ssize_t i = half; i < form->num_classes; i++)
        out[i] = table[levels[i - half] >> 4];
}

static float highest(const float *values, Py_ssize_t count) {
    float most = values[0];
    for (Py_ssize_t i = 1; i < count; i++)
        most = values[i] > most ? values[i] : most;
    return most;
}

static void normalize(float *values, Py_ssize_t count) {
    double sums[4] = {0, 0, 0, 0};
    Py_ssize_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int j = 0; j < 4; j++)
            sums[j] += values[i + j];
    for (; i < count; i++)
        sums[0] += values[i];
    double factor = 1 / (sums[0] + sums[1] + sums[2] + sums[3]);
    for (i = 0; i < count; i++)
        values[i] = (float)(values[i] * factor);
}

/* Return the level of the base of a class. */
static int level_at(const layout *form, const unsigned char *levels, Py_ssize_t i) {
    Py_ssize_t half = (form->num_classes + 1) / 2;
    if (form->bits == 8)
        return levels[i];
    return i < half ? levels[i] & 15 : levels[i - half] >> 4;
}

/* Count the classes without heatmap at each level of the base. */
static void count_levels(const layout *form, const unsigned char *data, int counts[256]) {
    const unsigned char *levels = data + form->base;
    Py_ssize_t size = form->bits == 8 ? form->num_classes : (form->num_classes + 1) / 2;
    int of_bytes[256] = {0};
    for (Py_ssize_t i = 0; i < size; i++)
        of_bytes[levels[i]]++;
    memset(counts, 0, 256 * sizeof *counts);
    if (form->bits == 8)
        memcpy(counts, of_bytes, sizeof of_bytes);
    for (int upper = 0; form->bits == 4 && upper < 16; upper++)
        for (int lower = 0; lower < 16; lower++) {
            counts[lower] += of_bytes[16 * upper + lower];
            counts[upper] += of_bytes[16 * upper + lower];
        }
    if (form->bits == 4 && form->num_classes % 2)
        counts[levels[size - 1] >> 4]--;  /* belongs to no class */
    for (Py_ssize_t i = 0; i < form->k; i++)
        counts[level_at(form, levels, class_at(form, data, i))]--;
}

/* Write the softmax of a quantized base and the means of heatmaps. It needs one exponential per level. */
static void soften_levels(const layout *form, const unsigned char *data, const scratch *memory, double divisor, float *out) {
    int counts[256];
    double powers[256], sum = 0, most = memory->means[0];
    float table[256], step, low = range_at(form, data, form->k, &step);
    int num_levels = 1 << form->bits;
    count_levels(form, data, counts);
    for (Py_ssize_t i = 1; i < form->k; i++)
        most = fmax(most, memory->means[i]);
    for (int i = 0; i < num_levels; i++)
        if (counts[i])
            most = fmax(most, (float)i * step + low);
    for (int i = 0; i < num_levels; i++) {
        powers[i] = counts[i] ? exp(((float)i * step + low - most) / divisor) : 0;
        sum += counts[i] * powers[i];
    }
    for (Py_ssize_t i = 0; i < form->k; i++) {
        memory->means[i] = (float)exp((memory->means[i] - most) / divisor);
        sum += memory->means[i];
    }
    for (int i = 0; i < num_levels; i++)
        table[i] = (float)(powers[i] / sum);
    look_up(form, data + form->base, table, out);
    for (Py_ssize_t i = 0; i < form->k; i++)
        out[class_at(form, data, i)] = (float)(memory->means[i] / sum);
}

static void soften_halves(const layout *form, const unsigned char *data, const scratch *memory, double divisor, float *out) {
    for (Py_ssize_t i = 0; i < form->num_classes; i++)
        out[i] = half_at(data + form->base + 2 * i);
    for (Py_ssize_t i = 0; i < form->k; i++)
        out[class_at(form, data, i)] = memory->means[i];
    float most = highest(out, form->num_classes);
    for (Py_ssize_t i = 0; i < form->num_classes; i++)
        out[i] = expf((float)((out[i] - most) / divisor));
    normalize(out, form->num_classes);
}

static void soften_topk(const layout *form, const unsigned char *data, const scratch *memory, int is_visible, double divisor,
                        float *out) {
    memset(out, 0, (size_t)form->num_classes * sizeof *out);
    for (Py_ssize_t plane = 0; is_visible && plane < form->k; plane++) {
        float step = 1, low = form->bits == 16 ? 0 : range_at(form, data, plane, &step);
        for (Py_ssize_t y = memory->row_start; y < memory->row_end; y++)
            for (Py_ssize_t x = memory->column_start; x < memory->column_end; x++) {
                Py_ssize_t i = (plane * form->height + y) * form->width + x;
                const unsigned char *stored = data + form->logits + i * (form->bits == 16 ? 2 : 1);
                float logit = form->bits == 16 ? half_at(stored) : (float)*stored * step + low;
                out[class_at(form, data, i)] += memory->rows[y] * memory->columns[x] * logit;
            }
    }
    double most = highest(out, form->num_classes);
    float of_zero = (float)exp(-most / divisor);
    for (Py_ssize_t i = 0; i < form->num_classes; i++)
        out[i] = out[i] == 0 ? of_zero : (float)exp((out[i] - most) / divisor);
    normalize(out, form->num_classes);
}

/* Write the soft labels of a batch, and return whether all values are valid and all views are boxes. */
static int pool(const layout *form, const unsigned char **blobs, Py_ssize_t batch, const double *views, const double *divisors,
                const scratch *given, float *out) {
    scratch memory = *given;
    for (Py_ssize_t i = 0; i < batch; i++, out += form->num_classes) {
        int is_visible = weights_of(form, views + VIEW * i, &memory);
        if (is_visible < 0 || !(divisors[i] > 0) || !is_valid(form, blobs[i], memory.seen))
            return 0;
        if (form->is_topk) {
            soften_topk(form, blobs[i], &memory, is_visible, divisors[i], out);
        } else {
            pool_heatmaps(form, blobs[i], &memory);
            (form->bits == 16 ? soften_halves : soften_levels)(form, blobs[i], &memory, divisors[i], out);
        }
    }
    return 1;
}

static PyObject *py_check(PyObject *self, PyObject *args) {
    PyObject *tuple, *of_layout;
    layout form;
    Py_ssize_t batch;
    int are_valid = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &tuple, &of_layout) || !read_layout(of_layout, &form))
        return NULL;
    const unsigned char **blobs = read_blobs(tuple, &form, &batch);
    unsigned char *seen = malloc((size_t)form.num_classes);
    if (blobs != NULL && seen == NULL)
        PyErr_NoMemory();
    if (blobs == NULL || seen == NULL) {
        free(blobs);
        free(seen);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < batch && are_valid; i++)
        are_valid = is_valid(&form, blobs[i], seen);
    free(blobs);
    free(seen);
    return PyBool_FromLong(are_valid);
}

/* Read the numbers of a tuple, of which the last one may be a tuple of numbers. */
static int read_numbers(PyObject *tuple, Py_ssize_t count, double *numbers) {
    Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : 0;
    for (Py_ssize_t i = 0; i < size && i < count; i++) {
        PyObject *item = PyTuple_GetItem(tuple, i);
        if (i == size - 1 && PyTuple_Check(item))
            return read_numbers(item, count - i, numbers + i);
        numbers[i] = PyFloat_AsDouble(item);
        if (numbers[i] == -1 && PyErr_Occurred())
            return 0;
    }
    if (size != count)
        PyErr_SetString(PyExc_ValueError, "a view has the wrong number of values");
    return size == count;
}

static PyObject *py_pool(PyObject *self, PyObject *args) {
    PyObject *tuple, *of_layout, *views, *result = NULL;
    layout form;
    const char *divisors;
    Py_ssize_t batch, divisors_size;
    int is_pooled = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOy#", &tuple, &of_layout, &views, &divisors, &divisors_size) ||
        !read_layout(of_layout, &form))
        return NULL;
    const unsigned char **blobs = read_blobs(tuple, &form, &batch);
    if (blobs == NULL)
        return NULL;
    size_t size = (size_t)batch * sizeof(double);
    double *numbers = malloc(size * (VIEW + 1) + 1);
    float *floats = malloc((size_t)(form.height + 3 * form.width + form.k) * sizeof *floats);
    unsigned char *seen = malloc((size_t)form.num_classes);
    if (numbers == NULL || floats == NULL || seen == NULL) {
        PyErr_NoMemory();
    } else if (!PyTuple_Check(views) || PyTuple_Size(views) != batch || (size_t)divisors_size != size) {
        PyErr_SetString(PyExc_ValueError, "expected one view and one divisor per label map");
    } else {
        Py_ssize_t i = 0;
        while (i < batch && read_numbers(PyTuple_GetItem(views, i), VIEW, numbers + VIEW * i))
            i++;
        if (i == batch)
            result = PyByteArray_FromStringAndSize(NULL, batch * form.num_classes * (Py_ssize_t)sizeof(float));
    }
    if (result != NULL) {
        memcpy(numbers + VIEW * batch, divisors, size);
        float *means = floats + form.height + form.width;
        scratch memory = {floats, floats + form.height, 0, 0, 0, 0, means, means + form.k, seen};
        float *out = (float *)PyByteArray_AsString(result);
        Py_BEGIN_ALLOW_THREADS
        is_pooled = pool(&form, blobs, batch, numbers, numbers + VIEW * batch, &memory, out);
        Py_END_ALLOW_THREADS
    }
    free(blobs);
    free(numbers);
    free(floats);
    free(seen);
    if (result == NULL || is_pooled)
        return result;
    Py_DECREF(result);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"check", py_check, METH_VARARGS, "check(blobs, layout)\n\nReturn whether all values of label maps are in range."},
    {"pool", py_pool, METH_VARARGS,
     "pool(blobs, layout, views, divisors)\n\nReturn soft labels [B, C] as a bytearray of float32, or None. Views are a tuple of B "
     "`View`s, divisors [B] the bytes of float64."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_pooling", "Pool stored label maps under boxes.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__pooling(void) {
    return PyModule_Create(&module);
}
