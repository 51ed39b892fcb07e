// What Caffe SSD's functions need of protobuf, glog and the random numbers, and calls for Python.
// experiments/reference.py puts the functions, cut out of a clone, in place of the marked lines.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>
using namespace std;

struct Fatal {
    template <class T> Fatal& operator<<(const T& x) { cerr << x; return *this; }
    ~Fatal() { cerr << endl; abort(); }
};
#define CHECK(c) if (!(c)) Fatal() << #c
#define CHECK_EQ(a, b) CHECK((a) == (b))
#define CHECK_NE(a, b) CHECK((a) != (b))
#define CHECK_GT(a, b) CHECK((a) > (b))
#define CHECK_GE(a, b) CHECK((a) >= (b))
#define CHECK_LE(a, b) CHECK((a) <= (b))
#define CHECK_LT(a, b) CHECK((a) < (b))
#define LOG(level) Fatal()

#define FIELD(T, n) \
    T n##_ = 0; bool has_##n##_ = false; \
    T n() const { return n##_; } bool has_##n() const { return has_##n##_; } \
    void set_##n(T v) { n##_ = v; has_##n##_ = true; } void clear_##n() { has_##n##_ = false; }
struct NormalizedBBox {
    FIELD(float, xmin) FIELD(float, ymin) FIELD(float, xmax) FIELD(float, ymax)
    FIELD(int, label) FIELD(bool, difficult) FIELD(float, score) FIELD(float, size)
};
struct SampleConstraint {
    FIELD(float, min_jaccard_overlap) FIELD(float, max_jaccard_overlap)
    FIELD(float, min_sample_coverage) FIELD(float, max_sample_coverage)
    FIELD(float, min_object_coverage) FIELD(float, max_object_coverage)
};
struct Sampler {
    float low = 1, high = 1, narrow = 1, wide = 1;
    float min_scale() const { return low; }
    float max_scale() const { return high; }
    float min_aspect_ratio() const { return narrow; }
    float max_aspect_ratio() const { return wide; }
};
struct BatchSampler {
    Sampler s; SampleConstraint c; int trials = 50;
    int max_trials() const { return trials; }
    bool has_max_sample() const { return true; }
    int max_sample() const { return 1; }
    const Sampler& sampler() const { return s; }
    const SampleConstraint& sample_constraint() const { return c; }
};
enum MatchType { MultiBoxLossParameter_MatchType_BIPARTITE,
                 MultiBoxLossParameter_MatchType_PER_PREDICTION };
enum MiningType { MultiBoxLossParameter_MiningType_NONE,
                  MultiBoxLossParameter_MiningType_MAX_NEGATIVE,
                  MultiBoxLossParameter_MiningType_HARD_EXAMPLE };
enum ConfLossType { MultiBoxLossParameter_ConfLossType_SOFTMAX,
                    MultiBoxLossParameter_ConfLossType_LOGISTIC };
enum CodeType { PriorBoxParameter_CodeType_CORNER, PriorBoxParameter_CodeType_CENTER_SIZE,
                PriorBoxParameter_CodeType_CORNER_SIZE };
enum EmitType { EmitConstraint_EmitType_CENTER, EmitConstraint_EmitType_MIN_OVERLAP };
struct EmitConstraint {
    EmitType emit_type() const { return EmitConstraint_EmitType_CENTER; }
    float emit_overlap() const { return 0; }
};

static mt19937 generator;
void caffe_rng_uniform(int n, float a, float b, float* r) {
    uniform_real_distribution<float> uniform(a, nextafter(b, FLT_MAX));  // as Caffe: b included
    for (int i = 0; i < n; i++) r[i] = uniform(generator);
}
float BBoxSize(const NormalizedBBox& bbox, const bool normalized = true);
template <typename Dtype> Dtype BBoxSize(const Dtype* bbox, const bool normalized = true);
float JaccardOverlap(const NormalizedBBox&, const NormalizedBBox&, const bool normalized = true);

// FUNCTIONS

static const vector<float> variances = {.1f, .1f, .2f, .2f};
static NormalizedBBox get(const float* b) {
    NormalizedBBox x;
    x.set_xmin(b[0]); x.set_ymin(b[1]); x.set_xmax(b[2]); x.set_ymax(b[3]);
    return x;
}
static vector<NormalizedBBox> all(const float* b, int n) {
    vector<NormalizedBBox> boxes;
    for (int i = 0; i < n; i++) {
        boxes.push_back(get(b + 4 * i));
        boxes.back().set_size(BBoxSize(boxes.back()));
    }
    return boxes;
}
static void put(const NormalizedBBox& x, float* b) {
    b[0] = x.xmin(); b[1] = x.ymin(); b[2] = x.xmax(); b[3] = x.ymax();
}

extern "C" {
// Priors of one map -> how many.
int priors(int side, int image, float small, float large, const float* ratios, int n, float step,
           float* top_data) {
    typedef float Dtype;
    int layer_height = side, layer_width = side, img_height = image, img_width = image;
    float step_w = step, step_h = step, offset_ = .5;
    vector<float> min_sizes_(1, small), max_sizes_(1, large), aspect_ratios_(1, 1.f);
    for (int i = 0; i < n; i++) {
        aspect_ratios_.push_back(ratios[i]);
        aspect_ratios_.push_back(1. / ratios[i]);
    }
    // PRIORS
    return idx / 4;
}

void match(const float* priors, int p, const float* boxes, int g, int* index, float* overlap) {
    vector<int> indices;
    vector<float> overlaps;
    MatchBBox(all(boxes, g), all(priors, p), -1, MultiBoxLossParameter_MatchType_PER_PREDICTION,
              .5, false, &indices, &overlaps);
    copy(indices.begin(), indices.end(), index);
    copy(overlaps.begin(), overlaps.end(), overlap);
}

void encode(const float* priors, const float* boxes, int n, float* out) {
    for (int i = 0; i < n; i++) {
        NormalizedBBox code;
        EncodeBBox(get(priors + 4 * i), variances, PriorBoxParameter_CodeType_CENTER_SIZE, false,
                   get(boxes + 4 * i), &code);
        put(code, out + 4 * i);
    }
}

void decode(const float* priors, const float* codes, int n, float* out) {
    for (int i = 0; i < n; i++) {
        NormalizedBBox box;
        DecodeBBox(get(priors + 4 * i), variances, PriorBoxParameter_CodeType_CENTER_SIZE, false,
                   false, get(codes + 4 * i), &box);
        put(box, out + 4 * i);
    }
}

// MineHardExamples without its blobs: MAX_NEGATIVE, three negatives per positive, no NMS.
void mine(const float* conf, int p, int c, const int* index, const float* overlap,
          unsigned char* negative) {
    vector<vector<float>> loss;
    ComputeConfLoss(conf, 1, p, c, 0, MultiBoxLossParameter_ConfLossType_SOFTMAX, &loss);
    vector<pair<float, int>> eligible;
    int positives = 0;
    for (int m = 0; m < p; m++) {
        positives += index[m] > -1;
        negative[m] = 0;
        if (IsEligibleMining(MultiBoxLossParameter_MiningType_MAX_NEGATIVE, index[m], overlap[m],
                             .5f))
            eligible.push_back(make_pair(loss[0][m], m));
    }
    sort(eligible.begin(), eligible.end(), SortScorePairDescend<int>);
    int wanted = min(positives * 3, (int)eligible.size());
    for (int k = 0; k < wanted; k++) negative[eligible[k].second] = 1;
}

int suppress(const float* boxes, const float* scores, int n, int* kept) {
    vector<int> indices;
    ApplyNMSFast(boxes, scores, n, .01f, .45f, 1.f, 400, &indices);
    copy(indices.begin(), indices.end(), kept);
    return indices.size();
}

float average_precision(const float* scores, const int* found, int n, int objects, int points) {
    vector<pair<float, int>> tp, fp;
    for (int i = 0; i < n; i++) {
        tp.push_back(make_pair(scores[i], found[i]));
        fp.push_back(make_pair(scores[i], 1 - found[i]));
    }
    vector<float> precision, recall;
    float ap;
    ComputeAP(tp, objects, fp, points ? "11point" : "MaxIntegral", &precision, &recall, &ap);
    return ap;
}

void seed(unsigned s) { generator.seed(s); }

// ssd_pascal.py's seven samplers, then one of their boxes as annotated_data_layer.cpp picks it.
void crop(const float* boxes, int g, float* out) {
    vector<NormalizedBBox> objects = all(boxes, g), found;
    float whole[4] = {0, 0, 1, 1}, overlap[6] = {0, .1f, .3f, .5f, .7f, .9f};
    for (int i = 0; i < 7; i++) {
        BatchSampler sampler;
        if (i == 0) {
            sampler.trials = 1;
        } else {
            sampler.s.low = .3f; sampler.s.high = 1; sampler.s.narrow = .5f; sampler.s.wide = 2;
            if (i < 6) sampler.c.set_min_jaccard_overlap(overlap[i]);
            else sampler.c.set_max_jaccard_overlap(1);
        }
        GenerateSamples(get(whole), objects, sampler, &found);
    }
    put(found[generator() % found.size()], out);
}

// Boxes of the image -> boxes of the crop, and which stay.
void project(const float* crop, const float* boxes, int g, unsigned char* keep, float* out) {
    EmitConstraint centre;
    for (int i = 0; i < g; i++) {
        NormalizedBBox box;
        keep[i] = MeetEmitConstraint(get(crop), get(boxes + 4 * i), centre) &&
                  ProjectBBox(get(crop), get(boxes + 4 * i), &box);
        if (keep[i]) put(box, out + 4 * i);
    }
}
}
