// A head in device memory, as the kernels see it, and what they share of the prefix table.
#pragma once

#include <cstdint>

#include "kernels/beam.h"
#include "kernels/cuda/prefix_slots.h"
#include "kernels/search.h"

namespace cnnrnn {

// Labels are scored in panels of so many.
constexpr int kPanelLabels = 32;
// Rows (live paths) of a warp's tile.
constexpr int kTileRows = 16;

// How much the prefix table holds.
struct PrefixCounts {
  uint32_t generation;
  int32_t nodes;          // given out; may pass the capacity, and that many are not there
  int32_t parents;        // given rows of recurrent gates; the same
  int32_t ready_nodes;    // whose states are made
  int32_t ready_parents;  // whose recurrent gates are made
};

// What one call of the search counts.
struct CallCounts {
  unsigned long long lookups;  // scored live paths
  unsigned long long made;     // states that were asked for first by this call
  int32_t parked[2];           // images that wait after this pass and after the last one
  int32_t nonfinite_images;
  int32_t full;  // nonzero once the table had no room
};

// In device memory, one beside each prefix table, whose users come one after the other.
struct DeviceCounts {
  CallCounts call;
  PrefixCounts prefix;
};

struct DeviceHead {
  int32_t num_labels;    // L
  int32_t joint_dim;     // D
  int32_t joint_stride;  // D up to a multiple of 16; what is beyond D is 0
  int32_t hidden_dim;    // H
  int32_t panels;        // of kPanelLabels, END in the last one
  Cell cell;
  Activation activation;

  const unsigned char* exact_panels;  // [panels] as label_scores.h lays them out
  const unsigned char* fast_panels;   // [panels]
  const float* input_gates;           // [L+2, 4H]: U_w w and the biases, rows as label_embedding's
  const float* hidden_weight;         // [4H, H]
  const float* output_projection;     // [stride, H]

  // The prefix table. Node 0 is the root.
  DeviceCounts* counts;
  uint64_t slot_mask;
  int32_t node_capacity, parent_capacity;
  PrefixSlot* slots;       // [slot_mask + 1]
  int32_t* node_parent;    // [nodes]
  int32_t* node_label;     // [nodes]
  int64_t* node_slot;      // [nodes]
  int32_t* node_gates;     // [nodes] row of its recurrent gates; kNoGates before a child asks
  float* output;           // [nodes, H]
  float* cell_state;       // [nodes, H]
  float* projected;        // [nodes, stride]: U_o o
  int32_t* gates_parent;   // [parents] the node of a row
  float* recurrent_gates;  // [parents, 4H]: U_r r' of an extended prefix, shared by its children
};

constexpr int32_t kRootNode = 0;
constexpr int32_t kNoGates = -1;

// A path that ended in a search for marginals, with its score.
struct CompletePath {
  FinishedPath path;
  float score;
};

// Images of one call to search, and where the result goes; what differs between its passes.
struct SearchPass {
  BeamRules rules;
  ImageEmbeddings images;  // evidence: of all images of this pass, or null
  SearchOutput output;
  bool banked;                 // bank by bank: labels are known, or places are more than a beam's
  void* parked_beams;          // [B] of DeviceBeam<kCapacity>
  CompletePath* complete;      // [B, (T+1) places] where labels are known, for marginals
  const int32_t* image_list;   // the images of this pass; null: first_image and those after it
  const int32_t* image_count;  // how many, on the device; null: count
  int64_t first_image;
  int32_t count;          // with image_count, the most there can be
  bool resumes;           // the images go on from where they were parked
  bool marks_parked;      // no pass follows: the result of an image that waits is a mark
  int32_t* parked;        // [B] takes the images that wait for states
  int32_t* parked_count;  // how many
};

}  // namespace cnnrnn
