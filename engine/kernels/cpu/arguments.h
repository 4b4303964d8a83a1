// What Python hands to the kernels. Needs neither torch's headers nor its ABI, and of Python's only what stays the same from
// 3.11 on: a library that is built once works with every torch and Python that kvray takes.
//
// torch.Tensor hands out its memory by DLPack's table of C functions (dlpack.h, "C exchange API", since torch 2.10): one
// call per tensor, which copies nothing and counts no reference. What it says is valid as long as the call that has the
// tensor as an argument.
#pragma once

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvray {

// A Python exception is set.
struct PythonError : std::exception {};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <typename... Parts>
inline void check(bool is_right, const Parts&... parts) {
  if (__builtin_expect(!is_right, 0)) refuse(parts...);
}

enum class Dtype { kFloat, kBfloat16, kInt32, kInt64, kOther };

// As DLPack lays out a tensor, version 1.
struct Tensor {
  void* memory;
  int32_t device_type, device_id;  // 1: CPU
  int32_t num_dims;
  uint8_t code, bits;  // of an element: 0 a signed integer, 2 a float, 4 a bfloat16
  uint16_t lanes;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  int64_t dim() const { return num_dims; }
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + num_dims : i]; }
  int64_t stride(int64_t i) const { return strides[i < 0 ? i + num_dims : i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int32_t i = 0; i < num_dims; i++) count *= sizes[i];
    return count;
  }
  bool is_contiguous() const {
    int64_t wanted = 1;
    for (int32_t i = num_dims - 1; i >= 0; i--) {
      if (sizes[i] == 0) return true;
      if (sizes[i] != 1 && strides[i] != wanted) return false;
      wanted *= sizes[i];
    }
    return true;
  }
  bool has_shape_of(const Tensor& other) const {
    if (num_dims != other.num_dims) return false;
    for (int32_t i = 0; i < num_dims; i++)
      if (sizes[i] != other.sizes[i]) return false;
    return true;
  }
  Dtype dtype() const {
    if (code == 2 && bits == 32) return Dtype::kFloat;
    if (code == 4 && bits == 16) return Dtype::kBfloat16;
    if (code == 0 && bits == 32) return Dtype::kInt32;
    if (code == 0 && bits == 64) return Dtype::kInt64;
    return Dtype::kOther;
  }
  template <typename T>
  T* pointer() const {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + byte_offset);
  }
};

// The dtype, for people.
inline std::string dtype_name(const Tensor& tensor) {
  constexpr const char* kKinds[] = {"int", "uint", "float", "?", "bfloat", "complex", "bool"};
  return (tensor.code < 7 ? kKinds[tensor.code] : "?") + std::to_string(tensor.bits);
}

// The sizes, for people.
inline std::string shown(const Tensor& tensor) {
  std::ostringstream text;
  for (int32_t i = 0; i < tensor.num_dims; i++) text << (i ? ", " : "[") << tensor.sizes[i];
  text << (tensor.num_dims ? "]" : "[]");
  return text.str();
}

// torch.Tensor, and its table of functions.
class TorchTensors {
 public:
  // Throws PythonError where torch has no such table.
  void find() {
    PyObject* torch = PyImport_ImportModule("torch");
    type_ = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
    PyObject* capsule = type_ ? PyObject_GetAttrString(type_, "__dlpack_c_exchange_api__") : nullptr;
    table_ = capsule ? static_cast<const Table*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
    get_num_threads_ = table_ ? PyObject_GetAttrString(torch, "get_num_threads") : nullptr;
    Py_XDECREF(capsule);
    Py_XDECREF(torch);
    if (!get_num_threads_) throw PythonError();
    if (table_->major != 1) refuse("DLPack ", table_->major, ", want 1");
  }

  Tensor view(PyObject* object) const {
    if (!PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(type_))) refuse("want a tensor");
    Tensor tensor;
    if (table_->view(object, &tensor)) throw PythonError();
    check(tensor.device_type == 1, "want a tensor on the CPU");
    return tensor;
  }

  // torch sets up a thread's OpenMP when that thread computes first, which may be here.
  void set_up_thread() const {
    static thread_local bool is_set_up = false;
    if (is_set_up) return;
    PyObject* count = PyObject_CallNoArgs(get_num_threads_);
    if (!count) throw PythonError();
    Py_DECREF(count);
    is_set_up = true;
  }

 private:
  struct Table {
    uint32_t major, minor;
    const Table* previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*view)(void* object, Tensor* out);
    void* stream;
  };

  PyObject *type_ = nullptr, *get_num_threads_ = nullptr;
  const Table* table_ = nullptr;
};

inline TorchTensors torch_tensors;

// Arguments of one call, taken one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* objects, Py_ssize_t count) : objects_(objects), count_(count) {}

  Tensor tensor() { return torch_tensors.view(next()); }
  std::optional<Tensor> tensor_or_none() {
    PyObject* object = next();
    if (Py_IsNone(object)) return std::nullopt;
    return torch_tensors.view(object);
  }
  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }
  double number() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }
  bool flag() { return truth(next()); }
  std::optional<bool> flag_or_none() {
    PyObject* object = next();
    if (Py_IsNone(object)) return std::nullopt;
    return truth(object);
  }
  std::string text() {
    Py_ssize_t size;
    const char* characters = PyUnicode_AsUTF8AndSize(next(), &size);
    if (!characters) throw PythonError();
    return {characters, static_cast<size_t>(size)};
  }
  std::vector<int64_t> integers() {
    PyObject* list = next();
    check(PyList_Check(list), "want a list of integers");
    std::vector<int64_t> values(PyList_Size(list));
    for (size_t i = 0; i < values.size(); i++) {
      values[i] = PyLong_AsLongLong(PyList_GetItem(list, static_cast<Py_ssize_t>(i)));
      if (values[i] == -1 && PyErr_Occurred()) throw PythonError();
    }
    return values;
  }
  void end() const { check(at_ == count_, "got ", count_, " arguments, want ", at_); }

 private:
  PyObject* next() {
    check(at_ < count_, "got ", count_, " arguments, want more");
    return objects_[at_++];
  }
  static bool truth(PyObject* object) {
    const int value = PyObject_IsTrue(object);
    if (value < 0) throw PythonError();
    return value != 0;
  }

  PyObject* const* objects_;
  Py_ssize_t count_, at_ = 0;
};

// Other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// A function of Python's that calls F with its arguments, and answers None.
template <void (*F)(Arguments&)>
PyObject* called(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  try {
    torch_tensors.set_up_thread();
    Arguments arguments(objects, count);
    F(arguments);
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace kvray
