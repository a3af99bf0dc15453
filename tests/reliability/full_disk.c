// A disk that gets full: below the folder FULL_DISK a process may write FULL_DISK_BYTES, then no
// more. Loaded with LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long long left = -1;

long long full_disk_written = 0;

static int has_room(int fd, size_t bytes) {
  const char* folder = getenv("FULL_DISK");
  char link[64], path[4096];
  if (folder == NULL) return 1;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 1;
  path[length] = '\0';
  if (strncmp(path, folder, strlen(folder)) != 0) return 1;
  if (left < 0) left = atoll(getenv("FULL_DISK_BYTES"));
  left = left > (long long)bytes ? left - (long long)bytes : 0;
  full_disk_written += (long long)bytes;
  if (left > 0) return 1;
  errno = ENOSPC;
  return 0;
}

ssize_t write(int fd, const void* data, size_t bytes) {
  static ssize_t (*real)(int, const void*, size_t);
  if (real == NULL) real = (ssize_t(*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
  return has_room(fd, bytes) ? real(fd, data, bytes) : -1;
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  static ssize_t (*real)(int, const struct iovec*, int);
  if (real == NULL) real = (ssize_t(*)(int, const struct iovec*, int))dlsym(RTLD_NEXT, "writev");
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += parts[i].iov_len;
  return has_room(fd, bytes) ? real(fd, parts, count) : -1;
}
